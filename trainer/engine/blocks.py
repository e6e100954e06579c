"""Transformer blocks as units of ZeRO-3's gathering."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import set_z3_leaf_module
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import trainer.engine.lean_import  # noqa: F401


def gather_whole_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Make each transformer block one unit of ZeRO-3's gathering; returns those by name.

    Not blocks of which a part is frozen (low-rank additions): in 0.19.8 their parameters are
    released before the backward pass has used them. Nor can it do without a gradient of a block's
    input, which there is none of behind frozen embeddings: it is taken there, and dropped.
    """
    gathered: dict[str, nn.Module] = {}
    for name, block in model.named_modules():
        if isinstance(block, GradientCheckpointingLayer):
            uniform = len({parameter.requires_grad for parameter in block.parameters()}) == 1
            set_z3_leaf_module(block, uniform)
            if uniform:
                gathered[name] = block
                block.register_forward_pre_hook(_with_gradient)
    return gathered


def _with_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs, of which the first, the states, has a gradient where a block learns."""
    learns = any(parameter.requires_grad for parameter in block.parameters())
    if inputs and torch.is_grad_enabled() and learns and not inputs[0].requires_grad:
        return (inputs[0].detach().requires_grad_(), *inputs[1:])
    return inputs
