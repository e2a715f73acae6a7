"""Training on answers that the agent writes while it trains, rewarded by a judge."""
