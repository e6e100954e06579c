"""Transformer blocks as units of ZeRO-3's gathering."""

from __future__ import annotations

from deepspeed.utils import set_z3_leaf_module
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import trainer.engine.lean_import  # noqa: F401


def gather_whole_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Make each transformer block one unit of ZeRO-3's gathering; returns those by name.

    Not blocks of which a part is frozen (low-rank additions): in 0.19.8 their parameters are
    released before the backward pass has used them.
    """
    gathered: dict[str, nn.Module] = {}
    for name, block in model.named_modules():
        if isinstance(block, GradientCheckpointingLayer):
            uniform = len({parameter.requires_grad for parameter in block.parameters()}) == 1
            set_z3_leaf_module(block, uniform)
            if uniform:
                gathered[name] = block
    return gathered
