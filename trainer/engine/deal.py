"""Cutting a model into the ranks' shares, one parameter after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from torch import nn

import trainer.engine.lean_import  # noqa: F401
from trainer.models.stored import widened


def deal(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Leave this rank its share of every parameter, in the precision that the engine runs in.

    DeepSpeed would move the whole model to the device first, and widen or narrow all of it. Here a
    rank holds, beside the model as it was loaded, its share and one parameter. All ranks call.
    """
    half = bool(config.get("bf16", {}).get("enabled"))
    # Of a module without parameters: DeepSpeed's settings are made, and nothing is cut yet.
    zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=dict(config))
    for parameter in widened(model, torch.bfloat16 if half else torch.float32):
        zero._convert_to_zero_parameters([parameter])
    for buffer in model.buffers():
        buffer.data = buffer.data.to(zero.local_device)
