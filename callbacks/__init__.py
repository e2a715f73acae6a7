"""What happens around training: checkpoints, progress, the run folder, the report, the export."""
