"""Backbones and their heads.

- network_options, configurations, building, distributed_loading: build and load a network
- heads: class logits and token losses
- tree_reading, attention, self_checks: prefix trees: masks, attention, and checks that a backbone supports them
- adapters, quantization, adapter_files: LoRA and QLoRA
- sharding, forward: FSDP2
- weight_files, operations: files of weights; counts of operations, and devices
"""
