"""The only room that knows DeepSpeed."""

import os

import torch

# Where there is no GPU, DeepSpeed looks for one at its import and warns; so it is told.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
