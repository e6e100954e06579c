"""What a frozen teacher is, and what is read from it, as its YAML says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trainer.config import Frozen, PositiveInt
from trainer.errors import ConfigError
from trainer.teachers.efficientnet import SIZES
from trainer.teachers.frozen import Precision


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


def refuse_placement(spec: TeacherSpec, name: str) -> None:
    """ConfigError where a model that is loaded whole should be spread or sharded."""
    if spec.spread or spec.sharded:
        raise ConfigError(f"{name} is small and always held whole; leave out spread and sharded")
