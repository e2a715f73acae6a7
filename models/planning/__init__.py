"""What a run would take, without running it."""
