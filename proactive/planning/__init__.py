"""Parts of `proactive.plan`: the estimate of memory and time."""
