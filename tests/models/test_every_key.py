"""Every key of a model's section changes the model that is built, or is refused: none is dropped.

The keys are taken from the sections themselves, so that a new one fails here until it is listed
with a value that must show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.models import folders
from tests.models.folders import IMAGES, save
from tests.models.small import LENGTH, word_tokenizer
from trainer.config import Frozen
from trainer.errors import ConfigError
from trainer.models.config import (
    HeadConfig,
    ImageTowerConfig,
    LoraConfig,
    Pooling,
    StoredConfig,
    TowerConfig,
    TwoTowerConfig,
)
from trainer.models.image_tower import build_image_tower
from trainer.models.patch_tower import build_patch_tower
from trainer.models.tower import Tower
from trainer.models.two_tower import build_two_tower

SIZES = {"width": 32, "layers": 2, "heads": 2}
TOWER: dict[str, list[Any]] = {
    "path": ["elsewhere"],
    "stored": [{"folders": ["features"], "dim": 12}],
    "width": [48],
    "layers": [3],
    "heads": [4],
    "mlp_width": [40],
    "activation": ["quick_gelu"],
    "trained": [False],
    "lora": [{"rank": 2}],
    "pooling": [name for name in get_args(Pooling) if name != "auto"],
    "projection": ["new", "none"],
}
LORA: dict[str, list[Any]] = {"rank": [3], "alpha": [5], "layers": [["q_proj"], ["q_proj", "no"]]}
HEAD: dict[str, list[Any]] = {"layers": [2], "hidden": [24], "dim": [5], "norm": ["layer", "none"]}
MODEL: dict[str, list[Any]] = {
    "image_size": [48],
    "embed_dim": [20],
    "preset": ["small"],
    "patch_size": [4],
    "text_length": [LENGTH - 2],
    "vocabulary": [300],
    "tokenizer": ["a folder"],
    "head": [{"layers": 1, "hidden": 16, "dim": 8}],
    "bias": [True],
    "logit_scale_init": [3.0],
    "logit_bias_init": [-3.0],
    "prototype_scale_init": [4.0],
    "scale_max": [30.0],
}
BUILT = {"image": SIZES, "text": SIZES, "embed_dim": 24, "image_size": 32, "patch_size": 8}
SHAPE = ("embed_dim", "image_size", "patch_size")
SYNONYMS = {
    ("built", "image", "pooling", "cls"),  # what a CLIP transformer pools
    ("built", "text", "pooling", "eos"),
    ("clip", "image", "pooling", "cls"),
    ("clip", "text", "pooling", "eos"),
    ("loose", "image", "pooling", "cls"),
    ("loose", "text", "pooling", "mean"),
    ("loose", "image", "projection", "new"),  # the folders have none
    ("loose", "text", "projection", "new"),
}
"""Values that say what is done without them: beside a path, what was found at it."""


STORED: dict[str, list[Any]] = {
    "folders": [["elsewhere"]],
    "dim": [13],
    "layers": [0, 2],
    "width": [24],
}


def test_every_key_of_every_section_is_walked() -> None:
    sections = (
        *((TowerConfig, TOWER), (LoraConfig, LORA)),
        *((HeadConfig, HEAD), (StoredConfig, STORED)),
    )
    for section, known in sections:
        assert set(section.model_fields) == set(known)
    both = set(TwoTowerConfig.model_fields) | set(ImageTowerConfig.model_fields)
    assert both - {"image", "text"} == set(MODEL)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["built", "clip", "loose"])
def test_keys_of_towers_show_or_are_refused(kind: str, tmp_path: Path) -> None:
    """Built by size; loaded from one pair; and from two folders that are no pair."""
    start = values_of(kind, tmp_path)
    before = two_towers(start)
    for part in ("image", "text"):
        for key, value in walk(TOWER):
            changed = {**start, part: {**start[part], key: value}}
            if key == "path":
                changed[part] = {"path": other_folder(part, tmp_path)}
                changed |= {"embed_dim": 32}
            verdict((kind, part, key, value), before, changed)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["built", "clip", "loose"])
def test_keys_of_a_model_show_or_are_refused(kind: str, tmp_path: Path) -> None:
    start = values_of(kind, tmp_path)
    before = two_towers(start)
    for key, value in walk(MODEL):
        given = save(tmp_path / "words", folders.clip)[0] if key == "tokenizer" else value
        changed = {**start, key: given}
        if key == "preset":  # gives what nothing else does
            changed = {name: value for name, value in changed.items() if name not in SHAPE}
        if key in ("logit_bias_init", "prototype_scale_init"):
            refused(two_towers, changed)
            needs = {"bias": True} if key == "logit_bias_init" else {"head": MODEL["head"][0]}
            assert two_towers({**changed, **needs}) != two_towers({**start, **needs})
        elif key in ("vocabulary", "tokenizer"):
            tokens_come_from(kind, changed, key)
        else:
            verdict((kind, key, value), before, changed)


@pytest.mark.heavy
def test_keys_of_low_rank_additions_show_or_are_refused(tmp_path: Path) -> None:
    start = values_of("clip", tmp_path)
    start["image"] = {**start["image"], "lora": {}}
    before = two_towers(start)
    for key, value in walk(LORA):
        changed = {**start, "image": {**start["image"], "lora": {key: value}}}
        verdict(("clip", "lora", key, value), before, changed)
    with pytest.raises(ConfigError, match=r"lora.layers has no, but the linear layers of"):
        two_towers({**start, "image": {**start["image"], "lora": {"layers": ["q_proj", "no"]}}})


def test_keys_of_heads_show_or_are_refused() -> None:
    start = {**BUILT, "head": MODEL["head"][0]}
    before = two_towers(start)
    for key, value in walk(HEAD):
        verdict(("head", key, value), before, {**start, "head": {**start["head"], key: value}})
    refused(two_towers, {**BUILT, "head": {"layers": 0, "hidden": 16}})
    refused(two_towers, {**BUILT, "head": {"layers": 0, "norm": "none"}})


def test_keys_of_stored_features_show() -> None:
    """But for the folders, which decide what is read and not what reads it."""
    stored = {"folders": ["features"], "dim": 12, "width": 16}

    def built(section: dict[str, Any]) -> list[tuple[str, torch.Size]]:
        config = ImageTowerConfig.model_validate({"image": {"stored": section}, "embed_dim": 8})
        return [(n, value.shape) for n, value in build_image_tower(config).named_parameters()]

    before = built(stored)
    for key, value in walk(STORED):
        changed = {**stored, key: value}
        if changed.get("layers") == 0:
            del changed["width"]
        assert (built(changed) == before) == (key == "folders"), key


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["built", "clip"])
def test_keys_of_a_tower_whose_patches_are_read_show_or_are_refused(
    kind: str, tmp_path: Path
) -> None:
    start = {**values_of(kind, tmp_path), "embed_dim": 20}
    start.pop("text")
    before = patches(start)
    for key, value in walk(TOWER):
        changed = {**start, "image": {**start["image"], key: value}}
        if key == "path":
            changed["image"] = {"path": save(tmp_path / "second", other_clip)[0]}
            changed.pop("patch_size", None)
        try:
            found = patches(changed)
        except (ConfigError, ValidationError):
            continue
        assert (found != before) != ((key, str(value)) == ("pooling", "mean")), (key, value)


@pytest.mark.parametrize(
    ("name", "says"), [("dinov2", "has patches of 8"), ("convnext", "has patches of 4")]
)
def test_a_patch_size_beside_a_path_is_the_models_or_refused(
    name: str, says: str, tmp_path: Path
) -> None:
    """What a section says of a loaded model's patches must be true."""
    path, _ = save(tmp_path, IMAGES[name])
    own = int(says[-1])
    values = {"image": {"path": path}, "image_size": 32}
    build_image_tower(ImageTowerConfig.model_validate({**values, "patch_size": own}))
    config = ImageTowerConfig.model_validate({**values, "patch_size": 16})
    with pytest.raises(ConfigError, match=f"patch_size is 16, but .* {says}; drop model.patch"):
        build_image_tower(config)


# -- how a model that was built is told from another --------------------------------------------


def two_towers(values: Mapping[str, Any]) -> dict[str, Any]:
    config = TwoTowerConfig.model_validate({"text_length": LENGTH, **values})
    return looks(build_two_tower(config, word_tokenizer()))


def patches(values: Mapping[str, Any]) -> dict[str, Any]:
    config = ImageTowerConfig.model_validate(values)
    return looks(build_patch_tower(config, hidden=8, logit_scale=10.0))


def looks(model: nn.Module) -> dict[str, Any]:
    """All that decides what it answers and what learns."""
    found: dict[str, Any] = {
        name: (value.requires_grad, digest(value.detach()))
        for name, value in model.named_parameters()
    }
    for name, module in model.named_modules():
        found[f"{name} is"] = type(module).__name__
        for key in ("initial", "largest", "start", "scaling"):
            if key in vars(module):
                found[f"{name}.{key}"] = repr(getattr(module, key))
        if isinstance(module, Tower):
            found[name] = (module.pool, module.trained, module.causal)
            shape = vars(module.backbone.config)
            found[f"{name} sees"] = {
                key: shape.get(key)
                for key in ("image_size", "patch_size", "num_attention_heads", "hidden_act")
            }
    config: Any = model.config
    found["rows"] = (config.image_size, getattr(config, "text_length", None))
    return found


def digest(value: torch.Tensor) -> str:
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() + str(value.shape)


def verdict(what: tuple[Any, ...], before: dict[str, Any], changed: Mapping[str, Any]) -> None:
    """It shows, or is refused in a sentence; only a synonym may make the same model."""
    try:
        found = two_towers(changed)
    except (ConfigError, ValidationError):
        return
    said = tuple(map(str, what))
    assert (found != before) != (said in SYNONYMS), f"{what} is read and dropped"


def refused(build: Any, values: Mapping[str, Any]) -> None:
    with pytest.raises((ConfigError, ValidationError)):
        build(values)


def tokens_come_from(kind: str, values: Mapping[str, Any], key: str) -> None:
    """Which tokenizer a run takes stands in these keys; what it takes decides the embeddings."""
    if kind != "built" and key == "vocabulary":
        refused(two_towers, values)
        return
    config = TwoTowerConfig.model_validate({"text_length": LENGTH, **values})
    assert getattr(config, key) == values[key]
    if key == "tokenizer":
        assert config.vocabulary is None


def walk(keys: Mapping[str, list[Any]]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, values in keys.items() for value in values)


@cache
def _folder_of(name: str, folder: Path) -> str:
    makers: dict[str, Any] = {"clip": folders.clip, **folders.IMAGES, **folders.TEXTS}
    return save(folder / name, makers[name])[0]


def values_of(kind: str, folder: Path) -> dict[str, Any]:
    if kind == "built":
        return dict(BUILT)
    names = ("clip", "clip") if kind == "clip" else ("dinov2", "bert")
    image, text = (_folder_of(name, folder) for name in names)
    dim = 24 if kind == "clip" else 32
    return {"image": {"path": image}, "text": {"path": text}, "embed_dim": dim, "image_size": 32}


def other_folder(part: str, folder: Path) -> str:
    return _folder_of("vit" if part == "image" else "roberta", folder)


def other_clip() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return folders.clip()


def test_the_walk_notices_a_key_that_is_dropped() -> None:
    """The judge itself: a section that says the same in other words must not pass as a change."""
    with pytest.raises(AssertionError, match="read and dropped"):
        verdict(("built", "image_size", 32), two_towers(BUILT), {**BUILT, "image_size": 32})
    assert issubclass(TwoTowerConfig, Frozen)
