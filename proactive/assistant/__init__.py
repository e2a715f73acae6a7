"""The parts of the live assistant, which only `proactive.live` and `proactive.gate` need."""
