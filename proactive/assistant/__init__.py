"""The live assistant. Only `proactive.live` and `proactive.gate` use these modules.

An observation passes through them in this order:

    source_choice      which source --source names
    trace_source, activitywatch      yield observations
    activitywatch_client, spans, privacy      read what ActivityWatch recorded, without private content
    span_sequence, sentences, rewriting      make events of it
    assistant      takes observations and answers of the user, asks the models, and logs
    deciding      decides when the agent is asked, when an offer is shown, and how it ends
    live_gate      asks the gate
    notices, terminal_notices, page_notices, desktop_notices      show offers
    tools      act on accepted offers
    session_log, session_state      keep the session, so that it can continue
    session_export, session_summary, recalibration      use finished sessions
"""
