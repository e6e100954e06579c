"""An exported folder's own form: every weight by our names, and what the model is built from.

folder/native/         model.safetensors, prototype heads included; model.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from trainer.config import Frozen, PositiveInt
from trainer.data.tokenize import load_tokenizer
from trainer.errors import CheckpointError
from trainer.models.config import ImageTowerConfig, ModelConfig, TowerConfig, TwoTowerConfig
from trainer.models.image_tower import ImageTower, build_image_tower
from trainer.models.model import Model
from trainer.models.narrow import NarrowShape, narrow_tower, shape_of, whole_shape
from trainer.models.patch_tower import PatchTower, build_patch_tower
from trainer.models.tower import Pool, Tower
from trainer.models.two_tower import TwoTower, build_two_tower
from trainer.store import Identity
from trainer.types import TowerName

Exportable = TwoTower | ImageTower | PatchTower
Section = TypeVar("Section", TwoTowerConfig, ImageTowerConfig)
Form = TypeVar("Form", bound=Frozen)

NATIVE = Path("native")
OURS = (
    *("image.", "text.", "image_head.", "text_head."),
    *("logit_scale.", "logit_bias.", "prototype_scale."),
)
"""Beginnings of the names that a model is built with; what else trained beside it stays behind."""


class PatchForm(Frozen):
    """native/model.json of a model whose patches are compared with stored texts."""

    model: ImageTowerConfig
    hidden: PositiveInt
    """Width of the head between its two layers."""
    logit_scale: float
    """At the start of training; the weights hold the distance from it."""
    scale_max: float
    logit_bias: float | None
    """At the start of training."""
    texts: Identity | None
    """The vectors that it was trained against."""


class CutTower(Frozen):
    """A tower whose layers were cut."""

    backbone: dict[str, Any]
    """As transformers describes one of its class, sizes aside."""
    shape: NarrowShape
    pool: Pool
    causal: bool
    eos_token_id: int | None


class CutForm(Frozen):
    """native/model.json of two towers of which at least one was cut."""

    model: TwoTowerConfig
    cut: dict[TowerName, CutTower]


def load_exported(folder: Path | str) -> tuple[TwoTower, PreTrainedTokenizerFast]:
    """The model and tokenizer of an exported folder, prototype heads included."""
    folder = Path(folder)
    is_cut = "cut" in _said(folder)
    form, weights = _native(folder, CutForm) if is_cut else _native(folder, TwoTowerConfig)
    if not any(name.startswith("text.") for name in weights):
        raise CheckpointError(f"{folder} is no exported model with texts; it has no text tower")
    tokenizer = load_tokenizer(str(folder))
    if isinstance(form, CutForm):
        model = _cut_pair(_with_paths_in(folder, form.model), form.cut)
    else:
        model = build_two_tower(_with_paths_in(folder, form), tokenizer)
    load_trained(model, weights)
    return model.eval(), tokenizer


def cut_form(model: TwoTower) -> CutForm:
    """What `load_exported` makes a model with cut towers from."""
    towers: dict[TowerName, CutTower] = {}
    both: dict[TowerName, Tower] = {"image": model.image, "text": model.text}
    for name, tower in both.items():
        shape, settings = shape_of(tower), tower.backbone.config
        towers[name] = CutTower(
            backbone=settings.to_dict(),
            shape=shape or whole_shape(settings),
            pool=tower.pool,
            causal=tower.causal,
            eos_token_id=tower.eos_token_id,
        )
    config = as_exported(model, is_whole=True)
    assert isinstance(config, TwoTowerConfig)
    return CutForm(model=config, cut=towers)


def _cut_pair(config: TwoTowerConfig, cut: Mapping[TowerName, CutTower]) -> TwoTower:
    towers = {
        name: narrow_tower(
            *(_KINDS[name][0], _KINDS[name][1](**one.backbone), one.shape),
            embed_dim=config.embed_dim,
            pool=one.pool,
            trained=True,
            causal=one.causal,
            eos_token_id=one.eos_token_id,
        )
        for name, one in cut.items()
    }
    return TwoTower(config, image=towers["image"], text=towers["text"])


_KINDS: dict[str, tuple[Any, Any]] = {
    "image": (CLIPVisionModel, CLIPVisionConfig),
    "text": (CLIPTextModel, CLIPTextConfig),
}


def load_exported_image_tower(folder: Path | str) -> ImageTower:
    """The image tower of a folder that was exported from a model without a text tower."""
    folder = Path(folder)
    values, weights = _native(folder, ImageTowerConfig)
    model = build_image_tower(_with_paths_in(folder, values))
    load_trained(model, weights)
    return model.eval()


def load_exported_patch_tower(folder: Path | str) -> PatchTower:
    """The model of a folder that was exported from a run against stored texts."""
    folder = Path(folder)
    form, weights = _native(folder, PatchForm)
    model = build_patch_tower(
        _with_paths_in(folder, form.model),
        hidden=form.hidden,
        logit_scale=form.logit_scale,
        scale_max=form.scale_max,
        logit_bias=form.logit_bias,
    )
    load_trained(model, weights)
    return model.eval()


def load_again(folder: Path) -> Exportable:
    """The model of an exported folder, of whichever kind."""
    said = _said(folder)
    if "hidden" in said:
        return load_exported_patch_tower(folder)
    if "cut" in said or "text" in said:
        return load_exported(folder)[0]
    return load_exported_image_tower(folder)


def _said(folder: Path) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads((folder / NATIVE / "model.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no exported model: {error}") from error
    return said


def load_trained(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Load weights by name; only frozen ones, which the model has from its files, may be absent."""
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    expected = set(model.state_dict())
    known = expected | {name for name, _ in model.named_buffers()}  # tables that no state holds
    if wrong := sorted((expected - frozen - weights.keys()) | (weights.keys() - known)):
        raise CheckpointError(
            f"{len(wrong)} tensors stand on one side only, as {wrong[0]}; "
            "the weights are of another model"
        )
    try:
        model.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"the weights are of another model: {reason}") from error


def _native(folder: Path, kind: type[Form]) -> tuple[Form, dict[str, Tensor]]:
    try:
        values = kind.model_validate_json((folder / NATIVE / "model.json").read_text())
        return values, load_file(folder / NATIVE / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder} is no exported model: {reason}") from error


def _sections(config: ModelConfig) -> dict[str, TowerConfig]:
    """The towers of a model by name."""
    towers = {"image": config.image}
    return towers | ({"text": config.text} if isinstance(config, TwoTowerConfig) else {})


def save_native(model: Exportable, folder: Path, form: Frozen) -> None:
    """All weights but those of loaded and frozen backbones, which stand in their own folders;
    `form` is what the model is built from again."""
    (folder / NATIVE).mkdir(exist_ok=True)
    elsewhere = tuple(
        f"{name}.backbone."
        for name, section in _sections(model.config).items()
        if section.path is not None and not section.trained
    )
    weights = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
        if name.startswith(OURS) and not name.startswith(elsewhere)
    }
    save_file(weights, folder / NATIVE / "model.safetensors", metadata={"format": "pt"})
    (folder / NATIVE / "model.json").write_text(form.model_dump_json(indent=2) + "\n")


def as_exported(model: Exportable, *, is_whole: bool) -> ModelConfig:
    """Towers that were loaded from somewhere are found in the exported folder from now on.

    What was found when they were loaded is written down: where scales begin, and how a tower
    pools, which its own files alone may not say.
    """
    changes: dict[str, Any] = {}
    if isinstance(model, TwoTower):
        changes = {"tokenizer": ".", "vocabulary": None}
        changes["logit_scale_init"] = model.logit_scale.initial
        if model.logit_bias is not None:
            changes["logit_bias_init"] = model.logit_bias.start
    for name, section in _sections(model.config).items():
        if section.path is not None:
            tower: Any = model.get_submodule(name)
            found: dict[str, Any] = {"path": "." if is_whole else name}
            if not is_whole and tower.pool not in ("own", "clip"):
                found["pooling"] = tower.pool
            if isinstance(tower.projection, nn.Identity):
                found["projection"] = "none"
            changes[name] = section.model_copy(update=found)
    return model.config.model_copy(update=changes)


def _with_paths_in(folder: Path, config: Section) -> Section:
    is_pair = isinstance(config, TwoTowerConfig)
    changes: dict[str, Any] = {"tokenizer": str(folder)} if is_pair else {}
    for name, section in _sections(config).items():
        if section.path is not None:
            changes[name] = section.model_copy(update={"path": str(folder / section.path)})
    return config.model_copy(update=changes)
