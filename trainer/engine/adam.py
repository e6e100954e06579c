"""The optimizer of a run: AdamW, where its states are."""

from __future__ import annotations

from typing import Any

import torch

from trainer.config import OptimConfig
from trainer.engine.groups import parameter_groups
from trainer.models.model import Model


def adamw(model: Model, optim: OptimConfig, config: dict[str, Any]) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    groups = parameter_groups(named, optim, model.parameter_depth)
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    offloaded = offload.get("device", "none") != "none"
    on_gpu = torch.cuda.is_available()
    if offloaded and on_gpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        cpu_adam: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, betas=optim.betas, eps=optim.epsilon, adamw_mode=True
        )
        return cpu_adam
    return torch.optim.AdamW(groups, betas=optim.betas, eps=optim.epsilon, fused=on_gpu)
