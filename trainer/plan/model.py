"""The model of a run as shapes without numbers, and batches for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RunConfig, WordsConfig
from trainer.models.config import ImageTowerConfig, LoraConfig, TowerConfig, TwoTowerConfig
from trainer.models.model import Model
from trainer.models.patches import patches_per_side
from trainer.models.token_selection import KEPT, num_kept
from trainer.models.two_tower import build_two_tower
from trainer.plan.known_sizes import Sizes, sizes_of
from trainer.recipe import build_model
from trainer.types import Batch

_LORA_NAMES = {"o_proj": "out_proj", "gate_proj": "fc1", "up_proj": "fc1", "down_proj": "fc2"}
"""Layers of language models, and those that stand for them."""

_WORDS = 49408
"""Of a tokenizer that is in a folder: as many as CLIP's."""


class Shapes(NamedTuple):
    """A model without numbers."""

    model: Model
    tokenizer: PreTrainedTokenizerFast | None
    notes: tuple[str, ...]
    """What stands for what."""


@contextmanager
def without_numbers(dtype: torch.dtype) -> Iterator[None]:
    """Inside, tensors have shapes alone, and new weights are of `dtype`."""
    before = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def shapes_of(config: RunConfig, comm: Comm) -> Shapes:
    """Call it inside `without_numbers`. ConfigError where a loaded tower's sizes are not known."""
    section, notes, loras = _without_folders(config.recipe.model)
    tokenizer = _tokenizer(config, section)
    recipe = config.recipe.model_copy(update={"model": section, "inherit": None})
    if config.recipe.name == "lexvla":
        notes.append("planned as two towers: lexvla's adapter and rows of words are left out")
        model: Model = build_two_tower(section, tokenizer, comm, seed=config.seed)
    else:
        model = build_model(recipe, tokenizer, comm, seed=config.seed)
    for name, lora in loras.items():
        _add_low_rank(getattr(model, name).backbone, lora)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():  # running statistics are not of the weights' dtype
                module._buffers[name] = torch.zeros_like(buffer, dtype=torch.float32)
    model.gradient_checkpointing(config.gradient_checkpointing)
    return Shapes(model.train(), tokenizer, tuple(notes))


class _LowRank(nn.Module):
    """A frozen linear layer with a trained product of two thin ones beside it."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        added: Tensor = self.frozen(rows) + self.up(self.down(rows))
        return added


def _add_low_rank(backbone: nn.Module, lora: LoraConfig) -> None:
    """As `add_lora`, which converts weights and so needs their numbers."""
    wanted = {_LORA_NAMES.get(each, each) for each in lora.layers or ()}
    backbone.requires_grad_(False)
    for name, layer in list(backbone.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(layer, nn.Linear) and (last in wanted or not wanted):
            setattr(backbone.get_submodule(parent), last, _LowRank(layer, lora.rank))


def _without_folders(section: Any) -> tuple[Any, list[str], dict[str, Any]]:
    """The model's section with sizes in place of folders."""
    notes: list[str] = []
    loras: dict[str, Any] = {}
    if not isinstance(section, TwoTowerConfig | ImageTowerConfig):
        return section, notes, loras
    change: dict[str, Any] = {}
    for name in ("image", "text"):
        tower = getattr(section, name, None)
        if tower is None or tower.path is None:
            continue
        found = sizes_of(tower.path, name)
        notes.append(found.source)
        change[name] = _sized(tower, found)
        if tower.lora is not None:
            loras[name] = tower.lora
        if found.patch_size:
            change["patch_size"] = found.patch_size
        if found.vocabulary:
            change["vocabulary"] = found.vocabulary
    if isinstance(section, TwoTowerConfig):
        change = {"vocabulary": section.vocabulary or _WORDS, **change, "tokenizer": None}
    return section.model_copy(update=change), notes, loras


def _sized(tower: TowerConfig, sizes: Sizes) -> TowerConfig:
    pooling = "auto" if tower.pooling in ("eos", "cls") else tower.pooling
    return TowerConfig(
        width=sizes.width,
        layers=sizes.layers,
        heads=sizes.heads,
        mlp_width=sizes.mlp_width,
        activation="gelu",
        trained=tower.trained or tower.lora is not None,
        pooling=pooling,
    )


def _tokenizer(config: RunConfig, section: Any) -> PreTrainedTokenizerFast | None:
    words: WordsConfig | None = config.recipe.words()
    size = getattr(section, "vocabulary", None) or (words and (words.vocabulary or _WORDS))
    if not size:
        return None
    specials = ("<begin>", "<end>", "<pad>")
    names = [*(f"w{number}" for number in range(size - len(specials))), *specials]
    whole = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, "w0"))
    bos, eos, pad = specials
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token=bos, eos_token=eos, pad_token=pad
    )


def batch_of(config: RunConfig, model: Model, *, rows: int, dtype: torch.dtype) -> Batch:
    """What a step's micro-batch of `rows` samples looks like; inside `without_numbers`."""
    section: Any = config.recipe.model
    side = section.image_size
    views = config.recipe.wanted_views()
    stored = getattr(getattr(section, "image", None), "stored", None)
    shape = (3, side, side) if stored is None else (stored.dim,)
    images = torch.zeros(rows, *shape, dtype=dtype)
    reads = getattr(section, "text", None) is not None
    tokens = torch.zeros(rows, section.text_length, dtype=torch.int64) if reads else None
    batch = Batch(
        images=images,
        tokens=tokens,
        token_mask=None if tokens is None else torch.ones_like(tokens, dtype=torch.bool),
        sample_id=torch.zeros(rows, dtype=torch.int64),
    )
    if views.count > 1:
        further = torch.zeros(rows, views.count - 1, *shape, dtype=dtype)
        batch = batch._replace(views=further)
    kept = _kept(config, model, rows, views.count)
    return batch if kept is None else batch._replace(more={KEPT: kept})


def _kept(config: RunConfig, model: Any, rows: int, views: int) -> Tensor | None:
    tokens = getattr(config.recipe, "tokens", None)
    if tokens is None or not tokens.chooses:
        return None
    side = patches_per_side(model.image.backbone, config.recipe.model.image_size)
    groups = (side // tokens.group_size) ** 2
    count = num_kept(groups, tokens.keep, tokens.rounding) * tokens.group_size**2
    return torch.zeros(rows, views, count, dtype=torch.int64)


def cover_of(config: RunConfig, *, rows: int, dtype: torch.dtype) -> Batch | None:
    """The look that a momentum copy takes before a step, where patches are chosen by scores."""
    if not getattr(config.recipe, "needs_copy", False):
        return None
    side = round(config.recipe.model.image_size * config.recipe.wanted_views().cover_scale)
    cover = torch.zeros(rows, 3, side, side, dtype=dtype)
    return Batch(None, None, None, torch.zeros(rows, dtype=torch.int64), cover=cover)
