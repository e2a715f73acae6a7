"""The commands that a person runs: one module each (`python -m proactive.fit`, `.evaluate`, `.inspect`)."""
