"""The LightningModules, their optimizers and metrics, and their checkpoints."""
