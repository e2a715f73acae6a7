"""Files of backbones: in installed Python packages, and in GGUF files."""
