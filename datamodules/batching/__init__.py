"""From token ids to batches: prefix trees, layouts, steps, and the data modules."""
