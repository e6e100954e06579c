"""Trained weights to folders that `transformers` loads offline, and to plain safetensors.

folder/                config.json, model.safetensors: CLIPModel, where both towers are CLIP's
folder/image, text     else the towers alone, each as a transformers model
folder/                ditto, for an image tower alone: CLIPVisionModelWithProjection
folder/image           ditto, where patches are compared with stored texts: CLIPVisionModel
folder/                tokenizer (if there is a text tower), preprocessor_config.json, README.md
folder/native/         model.safetensors by our own names, prototype heads included; model.json
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainer.config import Frozen, PositiveInt, RunConfig
from trainer.data.tokenize import load_tokenizer, save_tokenizer
from trainer.data.views import IMAGE_MEAN, IMAGE_STD
from trainer.errors import CheckpointError, ConfigError
from trainer.export.card import image_card, model_card, patch_card
from trainer.models.config import ModelConfig, TowerConfig
from trainer.models.image_tower import ImageTower, ImageTowerConfig, build_image_tower
from trainer.models.lora import has_lora, merge_lora
from trainer.models.patch_tower import PatchTower, build_patch_tower
from trainer.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from trainer.store import Identity

Exportable = TwoTower | ImageTower
Rebuilt = Exportable | PatchTower
Section = TypeVar("Section", TwoTowerConfig, ImageTowerConfig)
Form = TypeVar("Form", bound=Frozen)

NATIVE = Path("native")
PATCH_HEAD = "image.projection.0.weight"
"""Only the head that reads single patches has it."""
LEGACY_EOS = 2
"""transformers reads this end-of-text id as that of old files, and pools at the largest id."""


class Exported(NamedTuple):
    """What an export wrote."""

    folder: Path
    is_clip: bool
    """True where `loads_as` is a CLIP class, whose `from_pretrained(folder)` loads it."""
    why_not_clip: str
    """Empty where it is."""
    loads_as: str
    """The class of transformers that loads the folder, or `towers apart`."""


def export_model(
    model: Rebuilt,
    tokenizer: PreTrainedTokenizerFast | None,
    folder: Path | str,
    *,
    data_licence: str | None = None,
    texts: Identity | None = None,
) -> Exported:
    """Write every form of a model; its weights must be whole (not sharded) and are kept as is.

    `data_licence` says in the model card what was trained on and under which terms. A tokenizer
    is needed where there is a text tower. `texts` says which vectors a model without one is
    compared with.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PatchTower):
        return _export_patch_tower(model, folder, data_licence, texts)
    plain = _without_lora(model)
    if isinstance(plain, ImageTower):
        exported = _export_image_tower(plain, folder, data_licence)
    else:
        assert tokenizer is not None
        exported = _export_two_tower(plain, tokenizer, folder, data_licence)
    _image_processor(model.config.image_size).save_pretrained(folder)
    _save_native(model, folder, _with_exported_paths(model.config, is_clip=exported.is_clip))
    return exported


def _without_lora(model: Exportable) -> Exportable:
    """The model itself, or a copy whose towers have their low-rank additions in their weights."""
    if not has_lora(model):
        return model
    plain = copy.deepcopy(model)
    for tower in [plain.image] if isinstance(plain, ImageTower) else [plain.image, plain.text]:
        merge_lora(tower.backbone)
    return plain


def _export_two_tower(
    model: TwoTower,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    data_licence: str | None,
) -> Exported:
    why_not_clip = _why_not_clip(model, tokenizer)
    if why_not_clip:
        model.image.backbone.save_pretrained(folder / "image")
        model.text.backbone.save_pretrained(folder / "text")
    else:
        clip_model(model, tokenizer).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    card = model_card(model.config, why_not_clip=why_not_clip, data_licence=data_licence)
    (folder / "README.md").write_text(card)
    loads_as = "towers apart" if why_not_clip else "CLIPModel"
    return Exported(folder, not why_not_clip, why_not_clip, loads_as)


def _export_image_tower(model: ImageTower, folder: Path, data_licence: str | None) -> Exported:
    why_not_clip = _why_not_clip_image(model)
    if why_not_clip:
        model.image.backbone.save_pretrained(folder / "image")
    else:
        clip_vision_model(model).save_pretrained(folder)
    card = image_card(model.config, why_not_clip=why_not_clip, data_licence=data_licence)
    (folder / "README.md").write_text(card)
    loads_as = "towers apart" if why_not_clip else "CLIPVisionModelWithProjection"
    return Exported(folder, not why_not_clip, why_not_clip, loads_as)


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


def _export_patch_tower(
    model: PatchTower, folder: Path, data_licence: str | None, texts: Identity | None
) -> Exported:
    tower = CLIPVisionModel(model.image.backbone.config)  # with the last norm that we leave out
    tower.load_state_dict({**tower.state_dict(), **model.image.backbone.state_dict()})
    tower.save_pretrained(folder / "image")
    config = _with_exported_paths(model.config, is_clip=False)
    assert isinstance(config, ImageTowerConfig)
    form = PatchForm(
        model=config,
        hidden=model.image.projection[0].out_features,
        logit_scale=model.logit_scale.initial,
        scale_max=model.logit_scale.largest,
        logit_bias=None if model.logit_bias is None else model.logit_bias.start,
        texts=texts,
    )
    _save_native(model, folder, form)
    _image_processor(model.config.image_size).save_pretrained(folder)
    card = patch_card(model.config, hidden=form.hidden, texts=texts, data_licence=data_licence)
    (folder / "README.md").write_text(card)
    return Exported(folder, False, "its head reads single patches", "towers apart")


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


def clip_vision_model(model: ImageTower) -> CLIPVisionModelWithProjection:
    """The same weights as transformers' class; `CLIPVisionModel` loads what it saves too."""
    clip: CLIPVisionModelWithProjection = CLIPVisionModelWithProjection(model.image.backbone.config)
    backbone = model.image.get_submodule("backbone").state_dict()
    weights = {f"vision_model.{name}": value for name, value in backbone.items()}
    clip.load_state_dict(weights | {"visual_projection.weight": model.image.projection.weight})
    clip.eval()
    return clip


def clip_model(model: TwoTower, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """The same weights as a `CLIPModel`: equal embeddings for equal pixels and tokens."""
    log_scale = math.log(model.logit_scale().detach().item())
    settings = CLIPConfig(
        text_config=model.text.backbone.config.to_dict() | _special_tokens(tokenizer),
        vision_config=model.image.backbone.config.to_dict(),
        projection_dim=model.config.embed_dim,
        logit_scale_init_value=log_scale,
    )
    clip: CLIPModel = CLIPModel(settings)
    weights = {"logit_scale": torch.tensor(log_scale)}
    for ours, theirs in (("image", "vision"), ("text", "text")):
        tower = model.get_submodule(ours)
        backbone = tower.get_submodule("backbone").state_dict()
        weights |= {f"{theirs}_model.{name}": value for name, value in backbone.items()}
    weights["visual_projection.weight"] = model.image.projection.weight
    weights["text_projection.weight"] = model.text.projection.weight
    clip.load_state_dict(weights)
    clip.eval()
    return clip


def load_exported(folder: Path | str) -> tuple[TwoTower, PreTrainedTokenizerFast]:
    """The model and tokenizer of an exported folder, prototype heads included."""
    folder = Path(folder)
    values, weights = _native(folder, TwoTowerConfig)
    if not any(name.startswith("text.") for name in weights):
        raise CheckpointError(f"{folder} is no exported model with texts; it has no text tower")
    tokenizer = load_tokenizer(str(folder))
    model = build_two_tower(_with_paths_in(folder, values), tokenizer)
    load_trained(model, weights)
    return model.eval(), tokenizer


def load_exported_image_tower(folder: Path | str) -> ImageTower:
    """The image tower of a folder that was exported from a model without a text tower."""
    folder = Path(folder)
    values, weights = _native(folder, ImageTowerConfig)
    model = build_image_tower(_with_paths_in(folder, values))
    load_trained(model, weights)
    return model.eval()


def rebuild_model(
    run: RunConfig, weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerFast | None
) -> Rebuilt:
    """The model of a run, with weights by name as a checkpoint holds them (in any dtype)."""
    config = getattr(run.recipe, "model", None)
    if not isinstance(config, ModelConfig):
        raise ConfigError(f"the recipe {run.recipe} has no model that can be rebuilt")
    if any(name.startswith("image_head.") for name in weights):
        config = config.with_head()
    model: Rebuilt
    if isinstance(config, ImageTowerConfig) and PATCH_HEAD in weights:
        recipe: Any = run.recipe
        model = build_patch_tower(
            config,
            hidden=len(weights[PATCH_HEAD]),
            logit_scale=recipe.initial_logit_scale,
            scale_max=recipe.scale_max,
            logit_bias=recipe.logit_bias_init if "logit_bias.shift" in weights else None,
            seed=run.seed,
        )
    elif isinstance(config, ImageTowerConfig):
        model = build_image_tower(config, seed=run.seed)
    else:
        assert tokenizer is not None
        config = config.with_bias() if "logit_bias.shift" in weights else config
        model = build_two_tower(config, tokenizer, seed=run.seed)
    load_trained(model, weights)
    return model.eval()


def load_trained(model: Rebuilt, weights: Mapping[str, Tensor]) -> None:
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
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder} is no exported model: {reason}") from error


def _why_not_clip_image(model: Exportable) -> str:
    if not isinstance(model.image.backbone, CLIPVisionModel):
        return f"the image tower is a {type(model.image.backbone).__name__}"
    if model.image.pool != "clip":
        return f"it pools by {model.image.pool}, which CLIP's vision tower does not"
    return ""


def _why_not_clip(model: TwoTower, tokenizer: PreTrainedTokenizerFast) -> str:
    if not isinstance(model.image.backbone, CLIPVisionModel):
        return f"the image tower is a {type(model.image.backbone).__name__}"
    if not isinstance(model.text.backbone, CLIPTextModel):
        return f"the text tower is a {type(model.text.backbone).__name__}"
    if (model.image.pool, model.text.pool) != ("clip", "eos"):
        return f"it pools by {model.image.pool} and {model.text.pool}, which CLIPModel does not"
    if tokenizer.eos_token_id == LEGACY_EOS:
        return f"the tokenizer's end token has id {LEGACY_EOS}, which CLIPModel takes for another"
    return ""


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _image_processor(size: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )


def _sections(config: ModelConfig) -> dict[str, TowerConfig]:
    """The towers of a model by name."""
    towers = {"image": config.image}
    return towers | ({"text": config.text} if isinstance(config, TwoTowerConfig) else {})


def _save_native(model: Rebuilt, folder: Path, form: Frozen) -> None:
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
        if not name.startswith(elsewhere)
    }
    save_file(weights, folder / NATIVE / "model.safetensors", metadata={"format": "pt"})
    (folder / NATIVE / "model.json").write_text(form.model_dump_json(indent=2) + "\n")


def _with_exported_paths(config: ModelConfig, *, is_clip: bool) -> ModelConfig:
    """Towers that were loaded from somewhere are found in the exported folder from now on."""
    changes: dict[str, Any] = {"tokenizer": "."} if isinstance(config, TwoTowerConfig) else {}
    for name, section in _sections(config).items():
        if section.path is not None:
            changes[name] = section.model_copy(update={"path": "." if is_clip else name})
    return config.model_copy(update=changes)


def _with_paths_in(folder: Path, config: Section) -> Section:
    is_pair = isinstance(config, TwoTowerConfig)
    changes: dict[str, Any] = {"tokenizer": str(folder)} if is_pair else {}
    for name, section in _sections(config).items():
        if section.path is not None:
            changes[name] = section.model_copy(update={"path": str(folder / section.path)})
    return config.model_copy(update=changes)
