"""Lightning callbacks: checkpoints, stopping, progress, throughput, report, export; the sharded strategy."""
