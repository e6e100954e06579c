"""A folder that transformers saved, loaded whole: nothing random in it, nothing made up.

What transformers raises on the way becomes a ConfigError that says what can be done.
"""

from __future__ import annotations

import hashlib
import json
import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

from trainer.errors import ConfigError
from trainer.models.stored import keep_as_stored, stored_type

Part = Literal["text", "image"]

RAISED = (
    *(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError),
    *(ImportError, NotImplementedError, AssertionError, SafetensorError),
)
"""What transformers raises on folders and inputs that it does not like."""

_RANDOM = ("drop", "jitter", "mask_ratio", "mask_time_prob", "mask_feature_prob", "noise_std")
_RANDOM_IF_GIVEN = ("pos_embed_rescale", "pos_embed_shift", "pos_embed_jitter")
_KERNELS = re.compile(r'"_?(?:attn|experts)_implementation[^"]*"\s*:[^}]*?"([^"]*/[^"]*)"')
_LONGEST_SENTENCE = 240
_FETCHED = ("*.json", "*.txt", "*.model", "*.safetensors")
"""Of a hub's files: no pickles."""
_NO_VALUE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")
"""Keys of a configuration that change no output."""


class Loaded(NamedTuple):
    """One tower of a folder."""

    backbone: Any
    projection: nn.Module | None
    """Into the space that a pair shares, behind the pooled state; None where the folder is no
    pair and has none. The identity where a pair compares pooled states themselves."""
    pair: Any
    """The whole pair, which says features of its own; None where the folder is none."""
    is_decoded: bool = False
    """The folder's model has a decoder too, which was left out."""


def load_folder(
    path: Path | str,
    *,
    part: Part,
    dtype: torch.dtype = torch.float32,
    local_files_only: bool = False,
    is_tower: bool = False,
) -> Loaded:
    """The image or text encoder at `path`, in evaluation mode and without anything random.

    A tower, which somebody will divide, may stay in the precision of its files until then.

    Of an encoder-decoder its encoder. Only safetensors are read. ConfigError where weights are
    missing that the output would need.
    """
    settings = folder_settings(path, local_files_only=local_files_only)
    calm_settings(settings)
    kind = _class_of(settings)
    half = stored_type(path) if is_tower else None

    def load(dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        try:
            return kind.from_pretrained(  # type: ignore[no-any-return]
                path,
                config=deepcopy(settings),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=local_files_only,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except RAISED as error:
            raise ConfigError(_not_loaded(path, part, error)) from error

    model, report = load(half or dtype)
    if half is not None and not keep_as_stored(model):
        model, report = load(dtype)
    elif half is not None:
        _say_float32(model)
    decoded = bool(settings.is_encoder_decoder) and hasattr(model, "get_encoder")
    _refuse_made_up(path, model, report["missing_keys"])
    model = model.get_encoder() if decoded else model
    calm_modules(model)
    return _part_of(model.eval(), part, path)._replace(is_decoded=decoded)


def _say_float32(model: Any) -> None:
    """Of all its parts: what a model that is widened later will be."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.dtype = torch.float32


@lru_cache(maxsize=16)
def local_folder(path: str) -> str:
    """`path` where it is a folder; of a hub id the folder of its files, fetched if need be.

    All that a folder says besides the model is read from there: pixels, pooling, prompts. A path
    that is neither stays as it is, for whoever loads it to complain.
    """
    if Path(path).exists() or len(Path(path).parts) != 2 or path.startswith((".", "~", "/")):
        return path
    try:
        return str(snapshot_download(path, allow_patterns=list(_FETCHED)))
    except (OSError, ValueError):
        return path


def load_pair(path: Path | str, *, dtype: torch.dtype = torch.float32) -> tuple[Loaded, Loaded]:
    """Image and text encoder of one folder, which is read once; ConfigError where it is no pair."""
    image = load_folder(path, part="image", dtype=dtype, local_files_only=True)
    if image.pair is None:
        raise ConfigError(
            f"{path} is a {type(image.backbone).__name__} and no pair of towers, so it can't say "
            "how well an image and a text match"
        )
    return image, _part_of(image.pair, "text", path)


def folder_settings(path: Path | str, *, local_files_only: bool = False) -> Any:
    """The configuration at `path`, as it was saved."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ConfigError(f"no model at {path}: it has no config.json{_in_our_form(folder)}")
    _refuse_kernels(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(
            path, local_files_only=local_files_only, trust_remote_code=False
        )
    except RAISED as error:
        if not folder.exists() and folder.is_absolute():
            raise ConfigError(f"no model at {path}: there is no such folder") from error
        raise ConfigError(
            f"transformers can't load a model from {path}: {first_line(error)}"
        ) from error


def _in_our_form(folder: Path) -> str:
    """What a folder is that `tools/export.py` could write for no class of transformers."""
    if not (folder / "native" / "model.json").exists():
        return ""
    return (
        ", since its towers were cut to widths that no class of transformers holds; a model of "
        "equal layers can be loaded: train with a larger recipe.gates.multiple, or give the run's "
        "folder where a run is asked for"
    )


def _refuse_kernels(path: Path) -> None:
    """ConfigError where attention or experts are computed by code of a hub, which transformers
    fetches and runs where the package `kernels` is installed."""
    try:
        said = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return  # transformers says what is wrong with it
    if found := _KERNELS.search(said):
        raise ConfigError(
            f"{path} names {found[1]!r}, code of a hub, for its implementation; take the key out: "
            "no code of a model's folder is run here"
        )


def settings_hash(settings: Any, **further: Any) -> str:
    """SHA-256 of all that a configuration says, and of `further` settings."""
    said = {k: v for k, v in settings.to_dict().items() if k not in _NO_VALUE}
    text = json.dumps({"model": said, **further}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def calm_settings(settings: Any) -> None:
    """No dropout of any kind, no jitter, no random masks, and no cache of keys and values."""
    for name, value in list(vars(settings).items()):
        if isinstance(value, float) and any(part in name for part in _RANDOM):
            setattr(settings, name, 0.0)
        elif name in _RANDOM_IF_GIVEN and value is not None:
            setattr(settings, name, None)
    if getattr(settings, "use_cache", False):
        settings.use_cache = False
    for name in ("vision_config", "text_config", "encoder", "decoder"):
        if hasattr(getattr(settings, name, None), "to_dict"):
            calm_settings(getattr(settings, name))


def calm_modules(model: nn.Module) -> None:
    """The same of modules that have numbers of their own."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and any(part in name for part in _RANDOM):
                setattr(module, name, 0.0)


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing. transformers lists all
    that it knows behind some sentences, which are cut."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return said if len(said) <= _LONGEST_SENTENCE else f"{said[:_LONGEST_SENTENCE].rstrip()}..."


def _class_of(settings: Any) -> Any:
    """The class that keeps what the folder has: a projection, or an encoder without decoder."""
    saved = (getattr(settings, "architectures", None) or [""])[0]
    if saved.endswith("WithProjection") and hasattr(transformers, saved):
        return getattr(transformers, saved)
    encoder = MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(settings.model_type, "")
    if encoder.endswith("EncoderModel") and hasattr(transformers, encoder):
        settings.is_encoder_decoder = False
        return getattr(transformers, encoder)
    known = getattr(transformers, saved, None)
    if type(settings) not in AutoModel._model_mapping and _is_model(known):
        return known  # one tower of a pair, such as SigLIP's of texts, which has no automatic class
    return AutoModel


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, PreTrainedModel)


def _not_loaded(path: Path | str, part: Part, error: BaseException) -> str:
    folder = Path(path)
    said = f"transformers can't load a {part} tower from {path}: {first_line(error)}"
    if (folder / "config.json").exists() and not any(folder.glob("*.safetensors")):
        if pickles := sorted(folder.glob("*.bin")):
            return (
                f"{path} has its weights in {pickles[0].name}, a pickle, which is not read; where "
                "you trust it, convert it once: load it with transformers and save_pretrained it"
            )
        return f"{path} has no safetensors with weights, so no {part} tower can be loaded from it"
    return said


def _refuse_made_up(path: Path | str, model: nn.Module, missing: set[str]) -> None:
    """ConfigError where weights were drawn at random because the folder lacks them.

    A pooler that was not saved is left out.
    """
    unused = ("pooler.", "decoder.", "lm_head.")
    if any(name.startswith("pooler.") for name in missing):
        setattr(model, "pooler", None)  # noqa: B010 (its type is a module)
    lacking = sorted(n for n in missing if not any(f".{part}" in f".{n}" for part in unused))
    if lacking:
        raise ConfigError(
            f"{path} lacks {len(lacking)} tensors that a {type(model).__name__} needs, as "
            f"{lacking[0]}; they would be random: save it from the model that was trained"
        )


def _part_of(model: Any, part: Part, path: Path | str) -> Loaded:
    vision, text = (getattr(model, name, None) for name in ("vision_model", "text_model"))
    if vision is None and text is None:
        return Loaded(model, None, None)
    tower = vision if part == "image" else text
    if tower is None:
        raise ConfigError(f"{path} is a {type(model).__name__}, which has no {part} tower")
    name = "visual_projection" if part == "image" else "text_projection"
    projection = getattr(model, name, None)
    is_pair = vision is not None and text is not None
    if projection is None and is_pair:
        projection = nn.Identity()
    return Loaded(tower, projection, model if is_pair else None)
