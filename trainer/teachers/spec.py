"""A frozen teacher by name or in YAML, and how it is loaded. Larger ones are a path: same code.

model: /models/Mistral-Nemo-Instruct-2407
prompts: flame
pooling: last
layer: 39
precision: bfloat16
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from trainer.errors import ConfigError
from trainer.settings.errors import explain
from trainer.settings.text import parsed_override
from trainer.teachers.efficientnet import SIZES
from trainer.teachers.fill import Teacher
from trainer.teachers.frozen import Shard
from trainer.teachers.image_folder import lite_teacher, vision_teacher
from trainer.teachers.on_disk import weights_hash
from trainer.teachers.pinned import DEFAULT_CACHE, PINNED, fetch_teacher
from trainer.teachers.section import KNOWN, TeacherSpec, refuse_placement
from trainer.teachers.text_folder import text_teacher

__all__ = ["TeacherSpec", "load_teacher", "read_spec", "refuse_placement", "weights_hash"]


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
        return lite_teacher(spec, folder, name, device)
    if not (folder / "config.json").exists():
        raise ConfigError(f"no model at {folder}: it has no config.json")
    if spec.kind == "image":
        return vision_teacher(spec, folder, name, device, shard)
    return text_teacher(spec, folder, name, device, shard)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"can't read the teacher {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values")
    return values
