"""A frozen teacher by name or in YAML, and how it is loaded. Larger ones are a path: same code.

model: /models/Mistral-Nemo-Instruct-2407
prompts: flame
pooling: last
layer: 39
precision: bfloat16
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, ValidationError
from safetensors.torch import load_file
from transformers import AutoConfig

from trainer.config import Frozen, PositiveInt
from trainer.config_errors import explain
from trainer.config_text import parsed_override
from trainer.data.corpus.wheels import sha256_of
from trainer.data.tokenize import load_tokenizer
from trainer.errors import ConfigError
from trainer.teachers.efficientnet import FEATURES, SIZES, EfficientNetLite
from trainer.teachers.fill import Teacher
from trainer.teachers.frozen import Precision, Shard, load_frozen, spread
from trainer.teachers.image import ImageTeacher, Pixels, VisionFeatures
from trainer.teachers.pinned import DEFAULT_CACHE, PINNED, WEIGHTS, fetch_teacher
from trainer.teachers.prompts import load_prompts
from trainer.teachers.text import TextTeacher
from trainer.teachers.universal import KIND as UNIVERSAL
from trainer.teachers.universal import load_universal

_LITE_MEAN, _LITE_DEVIATION = 127 / 255, 128 / 255


class TeacherSpec(Frozen):
    """A frozen model and what is read from it."""

    model: str
    """A pinned name (`minilm`, `smollm2` ...) or a folder that transformers saved."""
    name: str = ""
    """For people; the model's own where empty."""
    kind: Literal["text", "image"] = "text"
    """Of a pair of towers (CLIP): which one."""
    fields: tuple[str, ...] = ()
    """What is read, a group per reading: `txt`, or `long,txt` for alternatives. The prompts' where
    empty."""
    prompts: str = "plain"
    """A set's name or YAML file."""
    pooling: Literal["mean", "last", "cls", "projected"] = "mean"
    """`projected` is the image embedding of a pair of towers."""
    layer: int = Field(default=-1, ge=-1)
    """Blocks that are run; -1 is all of them and the final norm."""
    length: PositiveInt = 256
    """Tokens of a text; those behind are cut off."""
    unit_norm: bool = True
    precision: Precision = "float32"
    batch_tokens: PositiveInt = 8192
    """Of one forward pass, padding included; halved when memory runs out."""
    batch_images: PositiveInt = 16
    """Of one forward pass; halved when memory runs out. On a CPU many at once are slow: maps of
    more than some MiB get new memory from the system in every layer."""
    spread: bool = False
    """Lay the blocks over all devices of the process, then the CPU, then the disk."""
    sharded: bool = False
    """Deal the weights to all ranks (ZeRO-3); a block is gathered when it runs. Every rank reads
    the whole model into the CPU's memory once."""
    memory: dict[int | str, str] | None = None
    """How much of each may be used when spread, as {0: 70GiB, cpu: 100GiB}."""
    offload: Path | None = None
    """Folder for blocks that fit nowhere else when spread."""
    image_size: PositiveInt | None = None
    """Pixels of a side; the model's own where None."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour under transparent pixels."""


KNOWN: dict[str, dict[str, Any]] = {
    "minilm": {"name": "all-MiniLM-L6-v2"},
    "smollm2": {"name": "SmolLM2-135M-Instruct"},
    "use-multilingual": {"name": "universal-sentence-encoder-multilingual-3"},
    **{name: {"name": name, "kind": "image"} for name in SIZES},
}


def read_spec(teacher: str, overrides: Sequence[str] = ()) -> TeacherSpec:
    """A spec from a pinned name, a folder or a YAML file, with `key=value` changes."""
    values: dict[str, Any] = {"model": teacher}
    if teacher.endswith((".yaml", ".yml")):
        values = _yaml(Path(teacher))
    for override in overrides:
        key, value = parsed_override(override)
        values[".".join(key)] = value
    values = {**KNOWN.get(str(values.get("model")), {}), **values}
    try:
        return TeacherSpec.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"teacher {teacher}: {explain(error, TeacherSpec)}") from error


def load_teacher(
    spec: TeacherSpec,
    *,
    device: torch.device | str = "cpu",
    cache: Path = DEFAULT_CACHE,
    shard: Shard | None = None,
) -> Teacher:
    """The teacher that a spec describes; pinned ones are fetched into `cache`.

    `shard` deals a model to the ranks where the spec asks for it: all of them call this then.
    """
    if spec.sharded and (spec.spread or shard is None):
        why = "spread is on too" if spec.spread else "only tools/embed.py shards teachers"
        raise ConfigError(f"teacher {spec.model}: sharded is on, but {why}")
    folder = fetch_teacher(spec.model, cache) if spec.model in PINNED else Path(spec.model)
    name = spec.name or folder.name
    if spec.model in SIZES:
        refuse_placement(spec, name)
        return _lite_teacher(spec, folder, name, device)
    if not (folder / "config.json").exists():
        raise ConfigError(f"no model at {folder}: it has no config.json")
    if spec.kind == "image":
        return _vision_teacher(spec, folder, name, device, shard)
    return _text_teacher(spec, folder, name, device, shard)


def refuse_placement(spec: TeacherSpec, name: str) -> None:
    """ConfigError where a model that is loaded whole should be spread or sharded."""
    if spec.spread or spec.sharded:
        raise ConfigError(f"{name} is small and always held whole; leave out spread and sharded")


def weights_hash(folder: Path) -> str:
    """SHA-256 of a folder's safetensors; of their hashes where they are several."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"no safetensors in {folder}")
    hashes = [sha256_of(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _text_teacher(
    spec: TeacherSpec, folder: Path, name: str, device: torch.device | str, shard: Shard | None
) -> TextTeacher:
    prompts = load_prompts(spec.prompts)
    universal = json.loads((folder / "config.json").read_text()).get("model_type") == UNIVERSAL
    if spec.pooling == "projected":
        raise ConfigError("pooling projected is for images; use mean, last or cls")
    if universal:
        refuse_placement(spec, name)
    return TextTeacher(
        load_universal(folder).to(device) if universal else _placed(spec, folder, device),
        load_tokenizer(str(folder)),
        prompts.with_fields(spec.fields) if spec.fields else prompts,
        name=name,
        hashes=(weights_hash(folder), sha256_of(folder / "tokenizer.json")),
        pooling="own" if universal else spec.pooling,
        layer=spec.layer,
        length=spec.length,
        unit_norm=spec.unit_norm,
        precision=spec.precision,
        batch_tokens=spec.batch_tokens,
        shard=shard,
    )


def _lite_teacher(
    spec: TeacherSpec, folder: Path, name: str, device: torch.device | str
) -> ImageTeacher:
    size = SIZES[spec.model]
    model = EfficientNetLite(size)
    model.load_state_dict(load_file(folder / WEIGHTS))
    pixels = Pixels(
        size=spec.image_size or size.image_size,
        mean=(_LITE_MEAN,) * 3,
        deviation=(_LITE_DEVIATION,) * 3,
        background=spec.background,
    )
    return ImageTeacher(
        model.to(device),
        pixels,
        name=name,
        model_hash=weights_hash(folder),
        pooling="mean of the last maps",
        dim=FEATURES,
        unit_norm=spec.unit_norm,
        batch_images=spec.batch_images,
    )


def _vision_teacher(
    spec: TeacherSpec, folder: Path, name: str, device: torch.device | str, shard: Shard | None
) -> ImageTeacher:
    if spec.pooling == "last":
        raise ConfigError("pooling last is for texts; use mean, cls or projected")
    projection = None
    model = _placed(spec, folder, device)
    settings: Any = model.config
    dim = int(settings.hidden_size)
    if spec.pooling == "projected":
        projection, dim = _projection(folder, device, spec.precision)
    features = VisionFeatures(
        model, how=spec.pooling, layer=spec.layer, projection=projection, shard=shard
    )
    return ImageTeacher(
        features,
        _pixels(folder, spec, int(settings.image_size)),
        name=name,
        model_hash=weights_hash(folder),
        pooling=spec.pooling,
        dim=dim,
        layer=spec.layer,
        unit_norm=spec.unit_norm,
        precision=spec.precision,
        batch_images=spec.batch_images,
    )


def _placed(spec: TeacherSpec, folder: Path, device: torch.device | str) -> Any:
    model = load_frozen(folder, part=spec.kind, precision=spec.precision)
    if spec.spread:
        return spread(model, layer=spec.layer, memory=spec.memory, offload=spec.offload)
    return model if spec.sharded else model.to(device)


def _projection(
    folder: Path, device: torch.device | str, precision: Precision
) -> tuple[torch.nn.Module, int]:
    """A pair's map from the pooled image into the shared space."""
    from transformers import AutoModel

    settings = AutoConfig.from_pretrained(folder, local_files_only=True)
    if settings.model_type != "clip":
        raise ConfigError(f"{folder} is a {settings.model_type}; pooling projected is for CLIP")
    pair: Any = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    dtype = getattr(torch, precision)
    return pair.visual_projection.to(device, dtype), int(settings.projection_dim)


def _pixels(folder: Path, spec: TeacherSpec, image_size: int) -> Pixels:
    """Mean and deviation as the folder's preprocessor_config.json has them."""
    try:
        found = json.loads((folder / "preprocessor_config.json").read_text())
        mean, deviation = tuple(found["image_mean"]), tuple(found["image_std"])
    except (OSError, ValueError, KeyError):
        raise ConfigError(f"{folder} lacks a preprocessor_config.json with mean and std") from None
    return Pixels(
        size=spec.image_size or image_size,
        mean=mean,
        deviation=deviation,
        background=spec.background,
    )


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"can't read the teacher {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values")
    return values
