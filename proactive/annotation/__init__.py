"""The parts of `python -m proactive.annotate`: the project file, the pages, what goes out, and the trace reader."""
