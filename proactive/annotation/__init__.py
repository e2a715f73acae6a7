"""Annotation and the trace reader. Only `proactive.annotate` uses most of these modules.

- project_file, store: the SQLite file of a project: units, annotators, labels
- server, guard, pages: the web server, its protection, and what all pages share
- labelling, overview, trace_reader: the pages of annotators, of the owner, and of traces
- labelled_rows, agreement_by_group: exported rows, and the agreement of annotators
"""
