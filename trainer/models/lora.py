"""Low-rank additions to a frozen transformer (LoRA, arXiv 2106.09685), by peft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.errors import ConfigError
from trainer.models.config import LoraConfig
from trainer.models.stored import seeming_wide


def add_lora(backbone: Any, config: LoraConfig) -> None:
    """Freeze `backbone` and give its linear layers W a learned addition: (alpha / rank) B A.

    B starts at zero, so the model starts as it was; A is drawn from torch's generator. In place:
    a layer keeps its name, its weight moves to `<layer>.base_layer.weight`.
    """
    from peft import LoraConfig as Settings
    from peft import inject_adapter_in_model

    _refuse_unknown(backbone, config.layers or ())
    settings = Settings(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.layers) if config.layers else "all-linear",
    )
    try:
        with seeming_wide(backbone):  # what is added is drawn in float32
            inject_adapter_in_model(settings, backbone)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"no low-rank additions to {type(backbone).__name__}: {reason}"
        ) from error


def _refuse_unknown(backbone: nn.Module, layers: Sequence[str]) -> None:
    """peft passes over names that no layer has, as long as another one is found."""
    linear = [n for n, module in backbone.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    unknown = [layer for layer in layers if not any(f".{n}".endswith(f".{layer}") for n in linear)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"lora.layers has {unknown[0]}, but the linear layers of {type(backbone).__name__} "
            f"are {', '.join(known)}"
        )


def merge_lora(backbone: Any) -> None:
    """Add what was learned to the weights and drop the rest: a plain model of transformers."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(backbone.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, module.get_base_layer())


def has_lora(model: nn.Module) -> bool:
    """Whether some layer of a model has low-rank additions."""
    return any("lora_A" in name for name, _ in model.named_parameters())
