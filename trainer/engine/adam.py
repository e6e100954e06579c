"""The optimizer of a run: AdamW, where its states are."""

from __future__ import annotations

import torch

from trainer.config import OptimConfig
from trainer.engine.groups import parameter_groups
from trainer.models.model import Model


def adamw(model: Model, optim: OptimConfig) -> torch.optim.Optimizer:
    """Of the trained parameters; one kernel a group on a GPU.

    That holds where weights are offloaded too: torch has a fused step on the CPU. DeepSpeed's own
    would be compiled at the first launch, by all ranks at once.
    """
    groups = parameter_groups(list(model.named_parameters()), optim, model.parameter_depth)
    fused = torch.cuda.is_available()
    return torch.optim.AdamW(groups, betas=optim.betas, eps=optim.epsilon, fused=fused)
