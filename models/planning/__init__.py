"""The memory of a run, estimated without running it, and changes that reduce it. Used by `proactive.planning`."""
