"""The memory of a run, estimated without running it."""
