"""Parts of `python -m proactive.inspect`."""
