"""LightningModules, the backbones under them, their optimizers and their metrics."""
