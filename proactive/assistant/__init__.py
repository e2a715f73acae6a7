"""The live assistant. Only `proactive.live` and `proactive.gate` use these modules.

- session_options, session_checks, session_setup, source_choice: options, and the session that they describe
- observations, trace_source, activitywatch: sources, which yield observations
- activitywatch_client, spans, privacy: read what ActivityWatch recorded, without private content
- span_sequence, sentences, rewriting: make events of it
- assistant, clock, model_thread: the loop: takes observations and answers of the user, asks the models, and logs
- deciding: decides when the agent is asked, when an offer is shown, and how it ends
- live_gate: asks the gate
- notices, terminal_notices, page_notices, desktop_notices: show offers
- tools: act on accepted offers
- session_log, session_state, session_folders: store the session, so that it can continue
- terminal_lines, session_summary: what the terminal shows of it
- session_export, recalibration: use finished sessions
"""
