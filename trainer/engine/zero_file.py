"""DeepSpeed's configuration: a file of ds_configs/, completed by what the run's YAML decides."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from trainer.comm import Comm
from trainer.config import OptimConfig
from trainer.engine.zero_sections import FROM_THE_RUN, refuse_unusable, refuse_unusable_zero
from trainer.errors import ConfigError
from trainer.settings.errors import explain

AUTO: Mapping[str, int] = {
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 10_000,
}
"""Elements, as in ds_configs/: what `auto` is for these; elsewhere it is DeepSpeed's default."""
_SECTIONS = ("zero_optimization", "bf16", "fp16", "torch_autocast", "optimizer")


class Decided(NamedTuple):
    """What the run decides and a DeepSpeed file may only repeat."""

    micro_batch: int
    accumulation: int
    """Micro-batches per step."""
    optim: OptimConfig


def completed(path: Path, comm: Comm, decided: Decided) -> dict[str, Any]:
    """The ZeRO file, completed by what has its home in the run's configuration.

    ConfigError, of one sentence, for whatever the file says that the run would not do.
    """
    config = _read(path)
    _refuse_scaled_losses(config, path)
    refuse_unusable(config, path)
    _refuse_another_optimizer(config.pop("optimizer", None), decided.optim, path)
    _refuse_other_numbers(config, comm, decided, path)
    config = _without_auto(config)
    if config.get("bf16", {}).get("enabled") == "auto":
        config["bf16"]["enabled"] = comm.device.type == "cuda"
    _check_precision(config, path)
    config["zero_optimization"] = _checked_zero(config.get("zero_optimization", {}), path)
    return _as_deepspeed_reads_it(config | _injected(decided, config), path)


def _read(path: Path) -> dict[str, Any]:
    """The file's mapping, its sections mappings too, under the names of today."""
    try:
        config = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_once)
    except OSError as error:
        raise ConfigError(f"can't read the DeepSpeed file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the DeepSpeed file {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"the DeepSpeed file {path} must be a mapping of keys to values")
    if "bfloat16" in config and "bf16" not in config:
        config["bf16"] = config.pop("bfloat16")
    if isinstance(zero := config.get("zero_optimization"), bool):
        config["zero_optimization"] = {"stage": int(zero)}  # as DeepSpeed reads the old spelling
    for key in _SECTIONS:
        if key in config and not isinstance(config[key], dict):
            example = {"stage": 1} if key == "zero_optimization" else {"enabled": True}
            raise ConfigError(
                f"{path}: {key} is {config[key]!r}, not a section; "
                f'write "{key}": {json.dumps(example)}'
            )
    _refuse_what_is_no_number(config, path)
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"the key {twice[0]!r} stands twice in one section")
    return dict(pairs)


def _refuse_what_is_no_number(values: Mapping[str, Any], path: Path) -> None:
    """ConfigError for NaN and infinity, which JSON has not; but some never print: every inf-th."""
    for key, value in values.items():
        if isinstance(value, dict):
            _refuse_what_is_no_number(value, path)
        if isinstance(value, float) and not math.isfinite(value) and key != "steps_per_print":
            raise ConfigError(f"{path}: {key} is {value}; it must be a number")


def _refuse_scaled_losses(config: dict[str, Any], path: Path) -> None:
    """ConfigError where DeepSpeed would multiply the loss, as float16 gradients need it.

    Heads and other parts outside of it have their gradients from the same backward pass, and
    nobody would divide those again.
    """
    half = config.pop("fp16", {}).get("enabled", False)
    bf16 = config.get("bf16", {}).get("enabled", False)
    scaled = ["fp16"] if half and not (half == "auto" and bf16) else []
    amp = config.get("amp")
    scaled += ["amp"] if isinstance(amp, dict) and amp.get("enabled") else []
    autocast = config.get("torch_autocast", {})
    dtype = str(autocast.get("dtype")).removeprefix("torch.")
    if autocast.get("enabled") and dtype in {"fp16", "float16", "half"}:
        scaled.append("torch_autocast in float16")
    if scaled:
        raise ConfigError(
            f"{path} turns on {' and '.join(scaled)}, which scales losses: gradients outside of "
            'DeepSpeed (prototype heads) would be wrong by that factor; use "bf16": '
            '{"enabled": "auto"}, or nothing for float32'
        )


def _refuse_another_optimizer(section: Any, optim: OptimConfig, path: Path) -> None:
    """ConfigError unless it is the run's own AdamW, or leaves everything to the run."""
    if section is None:
        return
    kind = str(section.get("type", "AdamW"))
    params = section.get("params") or {}
    ours = {
        "lr": optim.learning_rate,
        "betas": list(optim.betas),
        "eps": optim.epsilon,
        "weight_decay": optim.weight_decay,
        "torch_adam": True,
        "adam_w_mode": True,
    }
    wrong = [f"type {kind!r}"] if kind.lower() not in ("adamw", "adam", "auto") else []
    given = params if isinstance(params, dict) else {"params": params}
    for key, value in given.items():
        if value not in ("auto", ours.get(key)):
            wrong.append(f"{key} {value!r}")
    if kind.lower() == "muon":
        raise ConfigError(
            f"{path}: optimizer has type {kind!r}, and a run moves its towers by AdamW alone: a "
            "checkpoint holds two moments of each weight, and Muon has one; remove the section"
        )
    if wrong:
        raise ConfigError(
            f"{path}: optimizer has {', '.join(wrong)}, and the run's YAML decides it (optim: "
            f"AdamW, learning_rate {optim.learning_rate}, weight_decay {optim.weight_decay}); "
            "set it there and remove the section"
        )


def _refuse_other_numbers(config: dict[str, Any], comm: Comm, decided: Decided, path: Path) -> None:
    """ConfigError where the file and the run's YAML say different batch sizes or clipping."""
    rows = decided.micro_batch * decided.accumulation * comm.world_size
    counts = (rows, decided.micro_batch, decided.accumulation, decided.optim.clip_norm)
    keys = ("global_batch", "micro_batch", "global_batch / (ranks x micro_batch)")
    for key, ours, ruler in zip(FROM_THE_RUN, counts, (*keys, "optim.clip_norm"), strict=True):
        if (value := config.pop(key, "auto")) not in ("auto", ours):
            raise ConfigError(
                f"{path} sets {key} to {value}, and the run has {ours} ({ruler}), "
                "which the run's YAML decides; remove it"
            )


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is left to the program, but for what has a value of ours."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            kept[key] = _without_auto(value)
        elif value != "auto" or key == "enabled":
            kept[key] = value
        elif key in AUTO:
            kept[key] = AUTO[key]
    return kept


def _check_precision(config: Mapping[str, Any], path: Path) -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config

    bf16 = config.get("bf16", {})
    for key in ("bf16", "torch_autocast"):
        enabled = config.get(key, {}).get("enabled", False)
        if not isinstance(enabled, bool):
            raise ConfigError(f"{path}: {key}.enabled is {enabled!r}; write true, false or auto")
    if bf16.get("check_grad_overflow", True) is not True:
        raise ConfigError(f"{path}: bf16.check_grad_overflow must be true: NaN ends in no weight")
    if bf16.get("bf16_master_weights_and_grads") or bf16.get("bf16_optimizer_states"):
        raise ConfigError(f"{path}: bf16: weights and moments are kept in float32; remove the key")
    if bf16.get("enabled") and config.get("torch_autocast", {}).get("enabled"):
        raise ConfigError(f"{path} turns on bf16 and torch_autocast; one of them")
    try:
        DeepSpeedBF16Config(**bf16)
    except ValidationError as error:
        raise ConfigError(f"{path}: bf16: {explain(error, DeepSpeedBF16Config)}") from error


def _checked_zero(section: dict[str, Any], path: Path) -> dict[str, Any]:
    """The section with its stage as a number; ConfigError where DeepSpeed would not take it."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    stage = section.get("stage", 0)
    if str(stage) not in ("0", "1", "2", "3") or isinstance(stage, bool):
        raise ConfigError(f"{path}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    section = section | {"stage": int(stage)}
    try:
        refuse_unusable_zero(section, int(stage), path, on_gpu=torch.cuda.is_available())
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        told = explain(error, DeepSpeedZeroConfig)
        raise ConfigError(f"{path}: zero_optimization: {told}") from error
    return section


def _injected(decided: Decided, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": decided.micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": decided.optim.clip_norm,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": config.get("steps_per_print", sys.maxsize),
    }


def _as_deepspeed_reads_it(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """`config`, if DeepSpeed can make sense of all of it; what it raises as one sentence."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(config)
    except (DeepSpeedConfigError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: DeepSpeed can't use it: {_one_line(error)}") from error
    except AssertionError as error:
        raise ConfigError(f"{path}: DeepSpeed can't use it: {_one_line(error)}") from error
    return config


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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
