"""Stored features that a run learns on: checked before it starts, and never others later."""

from __future__ import annotations

from typing import Any

from trainer.comm import Comm
from trainer.parts.teacher_digests import TeacherDigests
from trainer.recipe import Part
from trainer.store.images import StoredImages

FEATURES = "features"
"""The part's name, in a recipe's parts and in checkpoints."""


def stored_features(model: Any, comm: Comm, *, views: int, seed: int) -> dict[str, Part]:
    """The part that remembers their encoder; none where the model reads pixels.

    ConfigError on all ranks where the stores are not what the model and the views ask for.
    """
    section = model.image.stored
    if section is None:
        return {}
    images = StoredImages(section.folders, dim=section.dim, seed=seed)
    return {FEATURES: TeacherDigests({FEATURES: images.check(comm, views=views)}, comm)}
