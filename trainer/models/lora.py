"""Low-rank additions to a frozen transformer (LoRA, arXiv 2106.09685), by peft."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.errors import ConfigError
from trainer.models.config import LoraConfig


def add_lora(backbone: Any, config: LoraConfig) -> None:
    """Freeze `backbone` and give its linear layers W a learned addition: (alpha / rank) B A.

    B starts at zero, so the model starts as it was; A is drawn from torch's generator. In place:
    a layer keeps its name, its weight moves to `<layer>.base_layer.weight`.
    """
    from peft import LoraConfig as Settings
    from peft import inject_adapter_in_model

    settings = Settings(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.layers) if config.layers else "all-linear",
    )
    try:
        inject_adapter_in_model(settings, backbone)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"no low-rank additions to {type(backbone).__name__}: {reason}"
        ) from error


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
