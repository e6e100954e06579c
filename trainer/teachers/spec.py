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
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, ValidationError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from trainer.config import IMAGE_FIELDS, Frozen, PositiveInt
from trainer.data.corpus.wheels import sha256_of
from trainer.data.pixels import Pixels, folder_pixels
from trainer.data.tokenize import load_tokenizer, tokenizer_digest
from trainer.errors import ConfigError
from trainer.models.folder import Loaded, folder_settings, load_folder, settings_hash
from trainer.models.inspection import (
    Reach,
    Sight,
    inspect_images,
    inspect_text,
    leave_out_head,
)
from trainer.models.load import own_text_tower, said_otherwise
from trainer.models.sentence_folder import (
    SentenceFolder,
    load_maps,
    read_sentence_folder,
    width_of,
)
from trainer.settings.errors import explain
from trainer.settings.text import parsed_override
from trainer.teachers.efficientnet import FEATURES, SIZES, EfficientNetLite
from trainer.teachers.fill import Teacher
from trainer.teachers.frozen import TORCH_DTYPES, Precision, Shard, spread
from trainer.teachers.image import ImageTeacher, VisionFeatures
from trainer.teachers.own_vectors import OwnVectors
from trainer.teachers.pinned import DEFAULT_CACHE, PINNED, WEIGHTS, fetch_teacher
from trainer.teachers.prompts import PromptSet, load_prompts
from trainer.teachers.text import TextTeacher
from trainer.teachers.universal import KIND as UNIVERSAL
from trainer.teachers.universal import load_universal

DEFAULT_LENGTH = 256
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
    empty. Of an image, the members that hold it, the first that a sample has, as `input.jpg`."""
    prompts: str = "plain"
    """A set's name or YAML file."""
    pooling: Literal["auto", "mean", "last", "cls", "projected"] = "auto"
    """`projected` is what the model makes of its states by itself; of a pair of towers (CLIP) the
    embedding. `auto`: what the folder says (sentence-transformers' 1_Pooling), else `projected`
    where the model has that, else the class token of images and the mean of texts."""
    layer: int = Field(default=-1, ge=-1)
    """Blocks that are run; -1 is all of them and the final norm."""
    length: PositiveInt | None = None
    """Tokens of a text; those behind are cut off. Where None, what the folder says, else 256, or
    fewer if the model reads no more."""
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
    prompts = prompts.with_fields(spec.fields) if spec.fields else prompts
    if json.loads((folder / "config.json").read_text()).get("model_type") == UNIVERSAL:
        refuse_placement(spec, name)
        tokenizer = load_tokenizer(str(folder))
        return TextTeacher(
            load_universal(folder).to(device),
            tokenizer,
            prompts,
            name=name,
            hashes=(weights_hash(folder), _tokenizer_hash(folder, tokenizer)),
            pooling="own",
            length=spec.length or DEFAULT_LENGTH,
            unit_norm=spec.unit_norm,
            batch_tokens=spec.batch_tokens,
            settings=tokenizer_digest(tokenizer),
        )
    return _sentence_teacher(spec, folder, name, device, shard, prompts)


def _sentence_teacher(
    spec: TeacherSpec,
    folder: Path,
    name: str,
    device: torch.device | str,
    shard: Shard | None,
    prompts: PromptSet,
) -> TextTeacher:
    began, words = time.perf_counter(), read_sentence_folder(folder)
    if spec.prompts == "plain" and words.prompt:
        prompts = prompts.behind(words.prompt)
    loaded = load_folder(
        words.model, part="text", dtype=TORCH_DTYPES[spec.precision], local_files_only=True
    )
    tokenizer = load_tokenizer(str(_tokenizer_folder(folder, words)))
    tail = longest_tail(tokenizer, prompts)
    asked = spec.length or words.length or DEFAULT_LENGTH
    reach = inspect_text(loaded.backbone, tokenizer, folder, length=asked + tail)
    length = _length(spec, reach, asked, tail, folder)
    pooling = _text_pooling(spec, words, loaded, reach)
    maps, dim = load_maps(words.maps) if words.maps else None, reach.width
    model: Any = loaded.backbone
    if pooling == "own":
        refuse_placement(spec, f"{name} with pooling projected")
        tower = own_text_tower(loaded, reach, tokenizer, str(folder), length=reach.row or length)
        dim = getattr(tower.projection, "out_features", reach.width)
        pad = int(tokenizer.pad_token_id)
        model = OwnVectors(tower, dim=dim, row=reach.row, pad_token=pad)
    note = f"{name}: {type(loaded.backbone).__name__}, {said(spec, words, pooling, length)}"
    return TextTeacher(
        _placed(spec, model, device),
        tokenizer,
        prompts,
        name=name,
        hashes=(weights_hash(words.model), _tokenizer_hash(folder, tokenizer)),
        pooling=pooling,
        layer=spec.layer,
        length=length,
        unit_norm=spec.unit_norm,
        precision=spec.precision,
        batch_tokens=spec.batch_tokens,
        shard=shard,
        dim=dim if maps is None else width_of(maps),
        maps=maps,
        lowercase=words.lowercase,
        settings=_settings(
            words.model, tokenizer=tokenizer_digest(tokenizer), maps=_maps_hash(words)
        ),
        note=f"{note}{said_otherwise(tokenizer)}; {_took(began)}",
    )


def _text_pooling(
    spec: TeacherSpec, words: SentenceFolder, loaded: Loaded, reach: Reach
) -> Literal["mean", "last", "cls", "own"]:
    """The spec's, else the folder's, else what the model pools by itself, else the mean."""
    asked = spec.pooling
    if asked == "auto":
        own = loaded.pair is not None or loaded.projection is not None or reach.pools
        asked = words.pooling or ("projected" if own else "mean")
    if asked != "projected":
        return asked
    if loaded.projection is None and not reach.pools:
        raise ConfigError(
            f"{spec.model} gives no vector of a text by itself, so pooling can't be projected; "
            "use mean, last or cls"
        )
    if spec.layer != -1:
        raise ConfigError("pooling projected runs all blocks; leave out layer, or use mean or last")
    return "own"


def _length(spec: TeacherSpec, reach: Reach, asked: int, tail: int, folder: Path) -> int:
    """Tokens of a text, so that its row is one that the model can read."""
    if reach.longest is None:
        return asked if reach.row is None else min(asked, reach.row)
    fits = reach.longest - tail
    if fits < 1 or (spec.length is not None and spec.length > fits):
        behind = f", {tail} of them for the prompt's words" if tail else ""
        raise ConfigError(
            f"length is {asked}, but {folder} reads at most {reach.longest} tokens{behind}; "
            f"set length={max(1, fits)} or less"
        )
    return fits


def said(spec: TeacherSpec, words: SentenceFolder, pooling: str, length: int) -> str:
    """How a text becomes a vector, and what of the folder's own word is not followed."""
    parts = [f"pooling {pooling} of {length} tokens at most"]
    if words.pooling is not None and spec.pooling != "auto" and spec.pooling != words.pooling:
        parts.append(f"though its 1_Pooling says {words.pooling}")
    if words.maps:
        parts.append("then " + ", ".join(place.name for place in words.maps))
    if words.prompt:
        used = "behind" if spec.prompts == "plain" else "without"
        parts.append(f"{used} its default prompt {words.prompt!r}")
    if words.prompts:
        parts.append(f"its prompts {', '.join(words.prompts)} are not used")
    return ", ".join(parts)


def longest_tail(tokenizer: PreTrainedTokenizerFast, prompts: PromptSet) -> int:
    """Tokens that prompts with facets add to a text, at most."""
    tails = [
        len(tokenizer(reading.prompt("") + " ".join(reading.facets))["input_ids"])
        + len(reading.facets)
        for reading in prompts.readings
        if reading.facets
    ]
    return max(tails, default=0)


def _tokenizer_folder(folder: Path, words: SentenceFolder) -> Path:
    """sentence-transformers keeps it beside the model or in the folder above."""
    inside = any((words.model / name).exists() for name in ("tokenizer.json", "vocab.txt"))
    return words.model if inside else folder


def _tokenizer_hash(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    file = folder / "tokenizer.json"
    return sha256_of(file) if file.exists() else tokenizer_digest(tokenizer)


def _settings(folder: Path, **further: str) -> str:
    return settings_hash(folder_settings(folder, local_files_only=True), **further)


def _maps_hash(words: SentenceFolder) -> str:
    return "".join(sha256_of(place / "model.safetensors") for place in words.maps)


def _took(began: float) -> str:
    return f"loaded and looked at in {time.perf_counter() - began:.1f} s"


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
        images=spec.fields or IMAGE_FIELDS,
    )


def _vision_teacher(
    spec: TeacherSpec, folder: Path, name: str, device: torch.device | str, shard: Shard | None
) -> ImageTeacher:
    if spec.pooling == "last":
        raise ConfigError("pooling last is for texts; use mean, cls or projected")
    began = time.perf_counter()
    loaded = load_folder(
        folder, part="image", dtype=TORCH_DTYPES[spec.precision], local_files_only=True
    )
    pixels = _pixels(folder, spec, loaded.backbone)
    sight = inspect_images(loaded.backbone, folder, size=pixels.size)
    how = _image_pooling(spec, loaded, sight, name)
    if how != "projected":
        leave_out_head(loaded.backbone)
    projection = loaded.projection if how == "projected" else None
    dim = int(getattr(projection, "out_features", sight.width))
    features = VisionFeatures(
        _placed(spec, loaded.backbone, device),
        how=how,
        layer=spec.layer,
        projection=None if projection is None else projection.to(device),
        shard=shard,
    )
    return ImageTeacher(
        features,
        pixels,
        name=name,
        model_hash=weights_hash(folder),
        pooling=how,
        dim=dim,
        layer=spec.layer,
        unit_norm=spec.unit_norm,
        precision=spec.precision,
        batch_images=spec.batch_images,
        settings=_settings(folder, pixels=pixels.text),
        note=f"{name}: {type(loaded.backbone).__name__}, pooling {how}, {pixels.text}; "
        f"{_took(began)}",
        images=spec.fields or IMAGE_FIELDS,
    )


def _image_pooling(
    spec: TeacherSpec, loaded: Loaded, sight: Sight, name: str
) -> Literal["cls", "mean", "projected"]:
    """The spec's, else what the model pools by itself, its class token, or the mean."""
    asked = spec.pooling
    own = sight.pools or loaded.projection is not None
    if asked == "auto":
        return "projected" if own else "cls" if sight.has_class_token else "mean"
    if asked == "cls" and not sight.has_class_token:
        raise ConfigError(f"{name} has no class token, so pooling can't be cls; use mean or auto")
    if asked == "projected" and not own:
        raise ConfigError(
            f"{name} pools nothing by itself, so pooling can't be projected; use cls or mean"
        )
    if asked == "projected" and spec.layer != -1:
        raise ConfigError("pooling projected runs all blocks; leave out layer, or use mean or cls")
    assert asked != "last"
    return asked


def _placed(spec: TeacherSpec, model: Any, device: torch.device | str) -> Any:
    model.requires_grad_(False)
    if spec.spread:
        return spread(model, layer=spec.layer, memory=spec.memory, offload=spec.offload)
    return model if spec.sharded else model.to(device)


def _pixels(folder: Path, spec: TeacherSpec, model: Any) -> Pixels:
    own = getattr(model.config, "image_size", None)
    pixels = folder_pixels(
        folder,
        size=spec.image_size,
        unsaid=own if isinstance(own, int) else None,
        background=spec.background,
    )
    if pixels is None:
        raise ConfigError(
            f"{folder} lacks a preprocessor_config.json (or processor_config.json) that says how "
            "images are resized and normalised; save the model's image processor into it"
        )
    return pixels


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"can't read the teacher {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values")
    return values
