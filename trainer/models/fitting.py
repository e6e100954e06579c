"""Whether a folder's model can be the tower that a run file asks for; each no is a sentence."""

from __future__ import annotations

from typing import Any

from trainer.errors import ConfigError
from trainer.models.config import ModelConfig, TowerConfig
from trainer.models.inspection import Reach
from trainer.models.sentence_folder import SentenceFolder


def check_image_size(backbone: Any, config: ModelConfig) -> None:
    patch, size, path = _patch_of(backbone), config.image_size, config.image.path
    if config.patch_size is not None and config.patch_size != patch:
        cuts = "has no patches of one size" if patch is None else f"has patches of {patch}"
        raise ConfigError(
            f"patch_size is {config.patch_size}, but {path} {cuts}; drop model.patch_size"
        )
    if patch is not None and size % patch:
        lower = max(patch, size // patch * patch)
        raise ConfigError(
            f"image_size is {size}, but {path} cuts images into patches of {patch}; "
            f"set model.image_size={lower} or {lower + patch}"
        )


def _patch_of(backbone: Any) -> int | None:
    """Pixels of a side of a patch, where there are square ones."""
    said = getattr(backbone.config, "patch_size", None)
    sides = set(said) if isinstance(said, list | tuple) else {said}
    side = sides.pop()
    return side if isinstance(side, int) and not sides else None


def check_length(reach: Reach, length: int, path: str) -> None:
    """ConfigError where a row is longer than the model reads."""
    if reach.longest is not None:
        raise ConfigError(
            f"text_length is {length}, but {path} reads at most {reach.longest} tokens; "
            f"set model.text_length={reach.longest}"
        )


def check_row(reach: Reach, length: int, path: str) -> None:
    if reach.fills and reach.row != length:
        raise ConfigError(
            f"{path} pools at the end of rows that are filled up to {reach.row} tokens, but "
            f"text_length is {length}; set model.text_length={reach.row}"
        )


def refuse_words(words: SentenceFolder, path: str) -> None:
    """ConfigError where a folder wants of a tower what only a teacher does."""
    if words.maps:
        raise ConfigError(
            f"{path} has maps behind its pooling ({', '.join(place.name for place in words.maps)}"
            "), which a tower does not carry on; use it as a teacher"
        )
    if words.prompt:
        raise ConfigError(
            f"{path} puts {words.prompt!r} before every text, which a tower does not; use it as a "
            "teacher, or take default_prompt_name out of its config_sentence_transformers.json"
        )


def refuse_text_pooling(section: TowerConfig) -> None:
    if section.pooling in ("eos", "last"):
        raise ConfigError(
            f"image.pooling is {section.pooling}, which is for texts; use mean or cls"
        )
