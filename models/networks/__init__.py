"""Backbones with their heads, how they read trees, adapters, shards and their files."""
