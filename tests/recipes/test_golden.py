"""The recipes as a run builds them, on the published code's arrays, in double and single."""

from __future__ import annotations

import numpy as np
import pytest

from tests.losses.rank_cases import RECIPE_FILES, golden, golden_names, results, world_size_of

FILES = [name for pattern in RECIPE_FILES for name in golden_names(pattern)]
TOLERANCES = {"float64": (1e-9, 1e-8), "float32": (1e-5, 1e-4)}
"""Of values, relative; of gradients, relative to the largest entry."""
SOFT = 1e-3
"""Of single-precision gradients of soft targets at a temperature of 0.01."""


def test_all_files_are_here() -> None:
    assert len(FILES) == 10 + 5 + 4 + 6 + 4


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("path", FILES)
def test_recipe(path: str, precision: str) -> None:
    """Values are compared in the mean over ranks. Where the original scores the whole batch on
    every rank without gradient through gathered rows, its features' gradients are ours over the
    ranks; FLAME's texts are frozen, so they have none here."""
    theirs, ranks = golden(path), results(world_size_of(path))
    own = [rank[f"{path} {precision}"] for rank in ranks]
    ours = {name: np.stack([rank[name] for rank in own]) for name in own[0]}
    rtol, largest = TOLERANCES[precision]
    if precision == "float32" and "soft" in path:
        largest = SOFT
    for name, value in expected_values(path, theirs).items():
        np.testing.assert_allclose(ours[name].mean(), value.mean(), rtol=rtol)
    shrunk = len(own) if feature_gradients_are_smaller(theirs) else 1
    for name in (name for name in ours if name.startswith("grad_")):
        wanted = theirs[name]
        found, wanted = (
            (ours[name].mean(), wanted.mean()) if "logit" in name else (ours[name] / shrunk, wanted)
        )
        allowed = largest * np.abs(wanted).max() + 1e-14
        np.testing.assert_allclose(found, wanted, rtol=0, atol=allowed, err_msg=name)


def expected_values(path: str, theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if "clip_distill" in path:
        parts = {
            "term clip": theirs["contrastive_loss"],
            "term distill": theirs["distill_loss"],
        }
        return {**parts, "loss": theirs["contrastive_loss"] + theirs["distill_loss"]}
    if "aclip/loss" in path:
        views = [theirs[f"loss_clip_view{view}"] for view in (1, 2)]
        return {
            "loss": theirs["loss_total"],
            "term clip": sum(views) / 2,
            "term simclr": theirs["loss_simclr_asreleased"],
            "term byol": theirs["loss_byol"],
        }
    if "aclip/simclr" in path:
        return {"term simclr": theirs["loss"]}
    if "step" in path:
        pairs = (("image", "text"), ("text", "image"))
        return {
            "loss": theirs["loss_total"],
            "term clip": theirs["loss_clip"],
            **{f"term {own}_from_{other}": theirs[f"loss_proto_{own}"] for own, other in pairs},
            **{f"term {own}_from_external": theirs[f"loss_external_{own}"] for own, _ in pairs},
        }
    return {"loss": theirs["loss"]}


def feature_gradients_are_smaller(theirs: dict[str, np.ndarray]) -> bool:
    return not theirs.get("local_loss", 0) and not theirs.get("gather_with_grad", 1)
