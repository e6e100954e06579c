"""Transformer blocks by torch's compiler, each on its own."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.errors import ConfigError

COMPILERS = ("g++", "clang++")


def compile_blocks(model: nn.Module) -> int:
    """Have the forward pass of each transformer block compiled; returns how many blocks there are.

    What stands between blocks, the names of weights and checkpointing are as without. Blocks of one
    shape share their code. The model's first pass is not compiled: hooks count its FLOPs within
    the blocks, and a graph that was broken by them would be left alone for ever.
    """
    blocks = [block for block in model.modules() if isinstance(block, GradientCheckpointingLayer)]
    if not blocks:
        raise ConfigError("compile_blocks=true, but this model has no transformer block; drop it")

    def compile_now(*_: Any) -> None:
        handle.remove()
        for block in blocks:
            block.forward = torch.compile(block.forward)

    handle = model.register_forward_hook(compile_now)
    return len(blocks)


def refuse_compiled_blocks(stage: int, *, changes_shape: bool) -> None:
    """ConfigError where compiled blocks can't work."""
    if stage == 3:
        raise ConfigError(
            "compile_blocks=true works under ZeRO stages 0, 1 and 2, for under ZeRO-3 a block's "
            "weights come and go while compiled code keeps them; set compile_blocks=false "
            "or deepspeed=ds_configs/zero2.json"
        )
    if changes_shape:
        raise ConfigError(
            "compile_blocks=true is for models that keep their shape, and this recipe can cut "
            "its model on the way; set compile_blocks=false"
        )
    wanted = (os.environ.get("CXX"), *COMPILERS)
    if not any(name and shutil.which(name) for name in wanted):
        raise ConfigError(
            "compile_blocks=true needs a C++ compiler, and neither g++ nor clang++ is here; "
            "install g++, or set compile_blocks=false"
        )
