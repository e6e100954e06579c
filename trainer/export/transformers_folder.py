"""Trained weights to folders that `transformers` loads offline, and to plain safetensors.

folder/                config.json, model.safetensors: CLIPModel, where both towers are CLIP's,
                       SiglipModel, where both are SigLIP's
folder/image, text     else the towers alone, each as a transformers model; not where they were
                       cut so that no class of transformers has room for them
folder/                ditto, for an image tower alone: CLIPVisionModelWithProjection
folder/image           ditto, where patches are compared with stored texts: CLIPVisionModel
folder/                what feeds it (`trainer.export.inputs`), README.md
folder/native/         all of it by our own names (`trainer.export.native`)
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import CLIPTextModel, CLIPVisionModel, PreTrainedTokenizerFast

from trainer.errors import ConfigError
from trainer.export.card import image_card, model_card, patch_card
from trainer.export.card_facts import OWN
from trainer.export.clip import clip_model, clip_vision_model, clip_vision_tower
from trainer.export.cut import filled_up, is_cut, why_not_whole
from trainer.export.inputs import save_inputs
from trainer.export.native import Exportable, PatchForm, as_exported, cut_form, save_native
from trainer.export.onnx_files import save_onnx
from trainer.export.open_clip_folder import save_open_clip
from trainer.export.siglip import is_siglip, siglip_model, why_not_siglip
from trainer.models.config import ImageTowerConfig
from trainer.models.image_tower import ImageTower
from trainer.models.load import model_pixels
from trainer.models.lora import has_lora, merge_lora
from trainer.models.model import Model
from trainer.models.narrow import shape_of
from trainer.models.patch_tower import PatchTower
from trainer.models.tower import Tower
from trainer.models.two_tower import TwoTower
from trainer.store import Identity

LEGACY_EOS = 2
"""transformers reads this end-of-text id as that of old files, and pools at the largest id."""


class Exported(NamedTuple):
    """What an export wrote."""

    folder: Path
    is_whole: bool
    """True where `loads_as` is a class whose `from_pretrained(folder)` loads all of it."""
    why_apart: str
    """Empty where it is."""
    loads_as: str
    """The class of transformers that loads the folder, `towers apart`, or `native form alone`."""
    beside: str = ""
    """What that class does not do by itself, in a sentence; empty where there is nothing."""


def export_model(
    model: Model,
    tokenizer: PreTrainedTokenizerFast | None,
    folder: Path | str,
    *,
    data_licence: str | None = None,
    texts: Identity | None = None,
    open_clip: bool = False,
    onnx: bool = False,
) -> Exported:
    """Write every form of a model; its weights must be whole (not sharded) and are kept as is.

    `data_licence` says in the model card what was trained on and under which terms. A tokenizer
    is needed where there is a text tower. `texts` says which vectors a model without one is
    compared with. `open_clip` and `onnx` ask for these forms too. ConfigError for a model that is
    neither of the known ones nor a kind of them, or that has no such form.
    """
    folder = Path(folder)
    if not isinstance(model, Exportable):
        kind = type(model).__name__
        raise ConfigError(f"no form is known to export a {kind}; two towers or an image tower are")
    if model.why_not_exported:
        raise ConfigError(
            f"no form is known to export this model: {model.why_not_exported}; every tool here "
            "opens its workdir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PatchTower):
        exported, card = _patch_tower(model, folder, texts, data_licence)
    elif isinstance(model, ImageTower):
        exported, card = _image_tower(model, folder, data_licence)
    else:
        if tokenizer is None:
            raise ConfigError("a model with a text tower is exported with its tokenizer")
        exported, card = _two_tower(model, tokenizer, folder, data_licence)
    length = model.config.text_length if isinstance(model, TwoTower) else 0
    save_inputs(
        folder,
        images=model_pixels(model.config),
        tokenizer=tokenizer,
        text_length=length,
        masked=exported.loads_as != "SiglipModel",
    )
    if open_clip:
        _open_clip_form(model, tokenizer, exported)
    if onnx:
        save_onnx(_without_lora(model), folder)
    (folder / "README.md").write_text(card)
    return exported


def _open_clip_form(
    model: Exportable, tokenizer: PreTrainedTokenizerFast | None, exported: Exported
) -> None:
    if not isinstance(model, TwoTower) or tokenizer is None:
        raise ConfigError(
            "open_clip has no class for an image tower alone; export it without --open-clip"
        )
    if exported.loads_as != "CLIPModel":
        raise ConfigError(
            f"open_clip's class can't hold this model ({exported.why_apart or exported.loads_as}); "
            "export it without --open-clip"
        )
    plain = _without_lora(model)
    assert isinstance(plain, TwoTower)
    save_open_clip(
        clip_model(filled_up(plain) if is_cut(model) else plain, tokenizer),
        exported.folder,
        tokenizer=tokenizer,
        text_length=model.config.text_length,
        images=model_pixels(model.config),
        bias=None if model.logit_bias is None else model.logit_bias().detach().item(),
    )


def _two_tower(
    model: TwoTower, tokenizer: PreTrainedTokenizerFast, folder: Path, data_licence: str | None
) -> tuple[Exported, str]:
    form = "SiglipModel" if is_siglip(model) else "CLIPModel"
    apart = why_not_siglip(model) if is_siglip(model) else _why_not_clip(model, tokenizer)
    bias = None if model.logit_bias is None else model.logit_bias().detach().item()
    plain, cut = _without_lora(model), is_cut(model)
    assert isinstance(plain, TwoTower)
    if apart and not cut:
        plain.image.backbone.save_pretrained(folder / "image")
        plain.text.backbone.save_pretrained(folder / "text")
    elif is_siglip(model):
        siglip_model(plain, tokenizer).save_pretrained(folder)
    elif not apart:
        clip_model(filled_up(plain) if cut else plain, tokenizer).save_pretrained(folder)
    save_native(model, folder, cut_form(model) if cut else as_exported(model, is_whole=not apart))
    towers = type(plain.image.backbone).__name__, type(plain.text.backbone).__name__
    card = model_card(
        *(model.config, form, ("", "") if cut else towers),
        scale=model.logit_scale().detach().item(),
        bias=bias,
        why_apart=apart,
        data_licence=data_licence,
        left={"image": shape_of(model.image), "text": shape_of(model.text)},
    )
    loads_as = (OWN if cut else "towers apart") if apart else form
    beside = "" if bias is None else _sigmoid_sentence(bias, loads_as)
    return Exported(folder, not apart, apart, loads_as, beside), card


def _sigmoid_sentence(bias: float, loads_as: str) -> str:
    if loads_as == "SiglipModel":
        return (
            f"trained with the sigmoid loss: a pair matches with probability sigmoid(logit), whose "
            f"bias of {bias:.4f} SiglipModel adds; texts are padded to max_length, without a mask"
        )
    where = "config.logit_bias" if loads_as == "CLIPModel" else "logit_bias of native/"
    return (
        f"trained with the sigmoid loss: a pair matches with probability sigmoid(logit + {where}), "
        f"here {bias:.4f}, and not softmax of the logits"
    )


def _image_tower(model: ImageTower, folder: Path, data_licence: str | None) -> tuple[Exported, str]:
    apart = _why_not_clip_image(model)
    plain = _without_lora(model)
    assert isinstance(plain, ImageTower)
    if apart:
        plain.image.backbone.save_pretrained(folder / "image")
    else:
        clip_vision_model(plain).save_pretrained(folder)
    save_native(model, folder, as_exported(model, is_whole=not apart))
    card = image_card(model.config, why_apart=apart, data_licence=data_licence)
    loads_as = "towers apart" if apart else "CLIPVisionModelWithProjection"
    return Exported(folder, not apart, apart, loads_as), card


def _patch_tower(
    model: PatchTower, folder: Path, texts: Identity | None, data_licence: str | None
) -> tuple[Exported, str]:
    plain = _without_lora(model)
    assert isinstance(plain, PatchTower)
    clip_vision_tower(plain).save_pretrained(folder / "image")
    config = as_exported(model, is_whole=False)
    assert isinstance(config, ImageTowerConfig)
    form = PatchForm(
        model=config,
        hidden=model.image.projection[0].out_features,
        logit_scale=model.logit_scale.initial,
        scale_max=model.logit_scale.largest,
        logit_bias=None if model.logit_bias is None else model.logit_bias.start,
        texts=texts,
    )
    save_native(model, folder, form)
    card = patch_card(model.config, hidden=form.hidden, texts=texts, data_licence=data_licence)
    return Exported(folder, False, "its head reads single patches", "towers apart"), card


def _without_lora(model: Exportable) -> Exportable:
    """The model itself, or a copy whose towers have their low-rank additions in their weights."""
    if not has_lora(model):
        return model
    plain = copy.deepcopy(model)
    for tower in (plain.image, plain.text) if isinstance(plain, TwoTower) else (plain.image,):
        merge_lora(tower.backbone)
    return plain


def _why_not_clip_image(model: TwoTower | ImageTower) -> str:
    if not isinstance(model.image.backbone, CLIPVisionModel):
        return f"the image tower is a {type(model.image.backbone).__name__}"
    if model.image.pool != "clip":
        return f"it pools by {model.image.pool}, which CLIP's vision tower does not"
    return _why_no_matrix(model.image)


def _why_not_clip(model: TwoTower, tokenizer: PreTrainedTokenizerFast) -> str:
    if not isinstance(model.image.backbone, CLIPVisionModel):
        return f"the image tower is a {type(model.image.backbone).__name__}"
    if not isinstance(model.text.backbone, CLIPTextModel):
        return f"the text tower is a {type(model.text.backbone).__name__}"
    if (model.image.pool, model.text.pool) != ("clip", "eos"):
        return f"it pools by {model.image.pool} and {model.text.pool}, which CLIPModel does not"
    if tokenizer.eos_token_id == LEGACY_EOS:
        return f"the tokenizer's end token has id {LEGACY_EOS}, which CLIPModel takes for another"
    return _why_no_matrix(model.image) or _why_no_matrix(model.text) or why_not_whole(model)


def _why_no_matrix(tower: Tower) -> str:
    """CLIP's classes project by a matrix without a bias."""
    projection = tower.projection
    if isinstance(projection, nn.Linear) and projection.bias is None:
        return ""
    return f"its projection is a {type(projection).__name__}, and CLIP's a matrix without a bias"
