"""What holds for every test."""

import os

import torch
from hypothesis import settings

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read once, when `datasets` is imported; commands set it first
settings.register_profile("untimed", deadline=None)  # tests never assert time
settings.load_profile("untimed")
torch.set_num_threads(1)  # two workers share two cores
