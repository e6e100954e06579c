"""DeepSpeed's configuration: a file of ds_configs/, completed by what the run's YAML decides."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.comm import Comm
from trainer.config import OptimConfig
from trainer.errors import ConfigError


def completed(path: Path, comm: Comm, optim: OptimConfig, micro_batch: int) -> dict[str, Any]:
    """The ZeRO file, completed by what has its home in the run's configuration."""
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"can't read the DeepSpeed file {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"the DeepSpeed file {path} is not JSON: {error}") from error
    injected = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.clip_norm,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }
    if twice := sorted(set(injected) & set(config) | set(config) & {"train_batch_size"}):
        raise ConfigError(
            f"{path} sets {', '.join(twice)}, which the run's YAML decides; remove it"
        )
    _refuse_scaled_losses(config, path)
    if config.get("bf16", {}).get("enabled") == "auto":
        config["bf16"]["enabled"] = comm.device.type == "cuda"
    config.setdefault("zero_optimization", {"stage": 0})
    return config | injected


def _refuse_scaled_losses(config: Mapping[str, Any], path: Path) -> None:
    """ConfigError where DeepSpeed would multiply the loss, as float16 gradients need it.

    Heads and other parts outside of it have their gradients from the same backward pass, and
    nobody would divide those again.
    """
    scaled = [name for name in ("fp16", "amp") if config.get(name, {}).get("enabled")]
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled") and str(autocast.get("dtype")) in {"fp16", "float16", "half"}:
        scaled.append("torch_autocast in float16")
    if scaled:
        raise ConfigError(
            f"{path} turns on {' and '.join(scaled)}, which scales losses: gradients outside of "
            'DeepSpeed (prototype heads) would be wrong by that factor; use "bf16": '
            '{"enabled": "auto"}, or nothing for float32'
        )


def for_frozen(dtype: torch.dtype) -> dict[str, Any]:
    """For a model that only runs, dealt to the ranks."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": sys.maxsize,
        # That is a Linear of its own, whose rounding differs.
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": 0,
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
