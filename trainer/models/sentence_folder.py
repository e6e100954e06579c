"""What a folder of sentence-transformers says besides the model: pooling, maps behind it, prompt.

modules.json lists the steps. What they say is carried out or refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from trainer.errors import ConfigError
from trainer.tensor_files import read_tensors

_POOLING = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
_POOLING |= {"lasttoken": "last"}
_ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU}


class SentenceFolder(NamedTuple):
    """The words of such a folder; the defaults are those of a folder that has none."""

    model: Path
    """Where transformers' own files are."""
    pooling: Literal["mean", "cls", "last"] | None = None
    """None where the folder does not say."""
    maps: tuple[Path, ...] = ()
    """Folders of linear maps behind the pooling."""
    length: int | None = None
    """Tokens of a text."""
    lowercase: bool = False
    prompt: str = ""
    """Stands before every text unless another is asked for."""
    prompts: tuple[str, ...] = ()
    """Names of prompts that the folder offers; none of them is used by itself."""


def read_sentence_folder(folder: Path | str) -> SentenceFolder:
    """ConfigError where the folder wants a step that is not known here."""
    folder = Path(folder)
    if not (folder / "modules.json").exists():
        return SentenceFolder(folder)
    steps = [
        (str(s.get("type", "")).rpartition(".")[2], folder / s.get("path", ""))
        for s in _json(folder / "modules.json")
    ]
    known = {"Transformer", "Pooling", "Dense", "Normalize"}
    if unknown := [kind for kind, _ in steps if kind not in known]:
        raise ConfigError(
            f"{folder}/modules.json has a step {unknown[0]}, which is not known here; known are "
            f"{', '.join(sorted(known))}"
        )
    places = dict(steps)
    said = _transformer(places.get("Transformer", folder))
    pooling = places.get("Pooling")
    prompts = _optional(folder / "config_sentence_transformers.json")
    offered = prompts.get("prompts") or {}
    default = prompts.get("default_prompt_name")
    return SentenceFolder(
        places.get("Transformer", folder),
        _pooling(pooling) if pooling and (pooling / "config.json").exists() else None,
        tuple(place for kind, place in steps if kind == "Dense"),
        said.get("max_seq_length"),
        bool(said.get("do_lower_case")),
        offered.get(default, "") if default else "",
        tuple(name for name, text in offered.items() if text and name != default),
    )


def load_maps(places: tuple[Path, ...]) -> nn.Sequential:
    """The linear maps behind the pooling, with their activations."""
    return nn.Sequential(*(_dense(place) for place in places))


def width_of(maps: nn.Sequential) -> int:
    """Numbers that come out of the last map."""
    return max(m.out_features for m in maps[-1].modules() if isinstance(m, nn.Linear))


def _transformer(place: Path) -> dict[str, Any]:
    return _optional(place / "sentence_bert_config.json")


def _pooling(place: Path) -> Any:
    values = _json(place / "config.json")
    on = [
        k.removeprefix("pooling_mode_")
        for k, v in values.items()
        if k.startswith("pooling_mode_") and v
    ]
    if isinstance(mode := values.get("pooling_mode"), str):
        on = mode.split("+") if "+" in mode else [mode]
    if len(on) != 1 or on[0] not in _POOLING:
        raise ConfigError(
            f"{place}/config.json pools by {' and '.join(on) or 'nothing'}; known here are cls, "
            "mean and lasttoken alone: set pooling to one of them yourself if that is meant"
        )
    if values.get("include_prompt") is False:
        raise ConfigError(
            f"{place}/config.json says include_prompt: false; leaving the prompt's tokens out of "
            "the mean is not known here"
        )
    return _POOLING[on[0]]


def _dense(place: Path) -> nn.Module:
    values = _json(place / "config.json")
    name = str(values.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = _ACTIVATIONS.get(name.rpartition(".")[2])
    if activation is None:
        raise ConfigError(f"{place}/config.json has the activation {name}, which is not known here")
    layer = nn.Linear(
        values["in_features"], values["out_features"], bias=bool(values.get("bias", True))
    )
    file = place / "model.safetensors"
    if not file.exists():
        raise ConfigError(f"{place} has no model.safetensors; save it anew, without pickles")
    weights = {
        k.removeprefix("linear."): v.float() for k, v in read_tensors(file, of="a map").items()
    }
    try:
        layer.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{file} does not hold the map that config.json describes") from error
    return nn.Sequential(layer, activation())


def _optional(path: Path) -> dict[str, Any]:
    return _json(path) if path.exists() else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no readable JSON: {error}") from error
