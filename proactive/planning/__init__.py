"""The estimate of `proactive.plan`: memory, operations and time of a run."""
