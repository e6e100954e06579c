"""Frozen transformers models, run up to the layer that is read and no further."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import (  # type: ignore[import-untyped]
    dispatch_model,
    infer_auto_device_map,
)
from jaxtyping import Float
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.folder import load_folder

Precision = Literal["float32", "float16", "bfloat16"]
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Sharded(Protocol):
    """A model of which every rank holds a part, so that all ranks run it equally often."""

    def __call__(self, **inputs: Any) -> Any: ...

    def stand_by(self, **spare: Any) -> None:
        """Run along on `spare` while another rank has something to run; then all return."""
        ...


Shard = Callable[[nn.Module], Sharded]


class FrozenStates(nn.Module):
    """The states of all tokens after `layer` blocks of a model (-1: all blocks and final norm).

    The blocks above are cut off: neither their memory nor their time is spent. `shard` deals the
    weights of the others to the ranks.
    """

    def __init__(self, model: nn.Module, *, layer: int = -1, shard: Shard | None = None) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.layer = layer
        self._states: Tensor | None = None
        if layer != -1:
            last = cut_blocks(model, layer)
            last.register_forward_hook(self._keep)
        self.sharded = None if shard is None else shard(model)

    def run(self, **inputs: Any) -> Any:
        """The model's own output."""
        return self.model(**inputs) if self.sharded is None else self.sharded(**inputs)

    def stand_by(self, **spare: Any) -> None:
        """Nothing more to run here: help the other ranks, where weights are dealt to them."""
        if self.sharded is not None:
            self.sharded.stand_by(**spare)
            self._states = None

    def forward(self, **inputs: Any) -> Float[Tensor, "batch length dim"]:
        output = self.run(**inputs)
        if self.layer == -1:
            states: Tensor = output.last_hidden_state
            return states
        kept, self._states = self._states, None
        assert kept is not None
        return kept

    def _keep(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self._states = output[0] if isinstance(output, tuple) else output


def cut_blocks(model: nn.Module, layer: int) -> nn.Module:
    """Keep the first `layer` blocks of a transformer; the last of them."""
    name, blocks = transformer_blocks(model)
    if not 1 <= layer <= len(blocks):
        kind = type(model).__name__
        raise ConfigError(f"layer {layer} of {kind}: it has blocks 1 to {len(blocks)}, or -1")
    parent = model.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], blocks[:layer])
    settings = getattr(model, "config", None)
    if getattr(settings, "num_hidden_layers", None) == len(blocks):
        settings.num_hidden_layers = layer  # type: ignore[union-attr]
    return blocks[layer - 1]


def transformer_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of a model's blocks: the longest of the outermost module lists."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"{type(model).__name__} has no list of blocks to cut; use layer -1")
    return min(lists, key=lambda item: (item[0].count("."), -len(item[1])))


def load_frozen(
    folder: Path | str, *, part: Literal["text", "image"], precision: Precision = "float32"
) -> nn.Module:
    """A model that `transformers` saved: an encoder, a decoder, or one tower of a pair.

    Of an encoder-decoder its encoder. Nothing is looked up on a hub.
    """
    loaded = load_folder(folder, part=part, dtype=TORCH_DTYPES[precision], local_files_only=True)
    found: nn.Module = loaded.backbone
    return found.requires_grad_(False)


def spread(
    model: nn.Module,
    *,
    layer: int = -1,
    memory: dict[int | str, str] | None = None,
    offload: Path | None = None,
) -> nn.Module:
    """Lay a model's first `layer` blocks over this process's devices, the CPU, then the disk.

    `memory` is how much may be used, as {0: "70GiB", "cpu": "100GiB"}; all that is free if None.
    The blocks run one after another, each on its device: for models larger than a card.
    """
    if layer != -1:
        cut_blocks(model, layer)
    whole = [type(block).__name__ for block in transformer_blocks(model)[1][:1]]
    places = infer_auto_device_map(
        model, max_memory=None if memory is None else dict(memory), no_split_module_classes=whole
    )
    if "disk" in places.values():
        if offload is None or places.get("") == "disk":
            raise ConfigError(
                "the model does not fit in the memory it may use"
                + ("; give a folder: offload" if offload is None else ", not even a block of it")
            )
        offload.mkdir(parents=True, exist_ok=True)
        # accelerate takes what lies in the folder for this model's weights: always a new one
        offload = Path(tempfile.mkdtemp(dir=offload))
    placed: nn.Module = dispatch_model(model, places, offload_dir=offload)
    return placed
