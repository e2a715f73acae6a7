"""The LightningModules, their optimizers and metrics, and their checkpoints.

- network_module, training: base classes: building the network, and the training loop
- reward_classifier, proactive_agent, preference_agent: the modules
- optimizers, adamw_8bit, run_length, finite_check: used by the training loop
- metrics, published_metrics, answer_metrics, pooling, preference_losses, calibration: losses and metrics
- checkpoint_paths, checkpoint_files, checkpoint_contents, sharded_files, saved_models: checkpoints and exports
"""
