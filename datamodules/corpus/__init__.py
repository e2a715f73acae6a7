"""What the data says: records, their readers and sources, splits, traces, the simulator. No torch, no Lightning."""
