"""The recipes as a run builds them, on the published code's arrays, in double and single."""

from __future__ import annotations

import numpy as np
import pytest

from tests.losses.rank_cases import (
    HEAD_SIZES,
    RECIPE_FILES,
    golden,
    golden_names,
    head_files,
    results,
    world_size_of,
)
from tests.recipes.prototype_cases import rows_of_cross_entropy

pytestmark = pytest.mark.heavy  # arrays of several ranks start them
FILES = [name for pattern in RECIPE_FILES for name in golden_names(pattern)]
TOLERANCES = {"float64": (1e-9, 1e-8), "float32": (1e-5, 1e-4)}
"""Of values, relative; of gradients, relative to the largest entry."""
SOFT = 1e-3
"""Of single-precision gradients of soft targets at a temperature of 0.01."""
MARGINS = 1e-3
"""Of single-precision gradients of margin losses at scales such as 64."""
NOTHING = {"float64": 1e-14, "float32": 1e-6}
"""What a gradient of zero may be."""
FLOOR = -np.log(1e-30)
"""The published value of a row of Partial FC is no larger."""


def test_all_files_are_here() -> None:
    assert len(FILES) == 10 + 5 + 4 + 6 + 4 + 3
    assert [len(head_files(size)) for size in (1, 2, 4)] == [12 + 5 + 1, 12 + 7 + 3, 12 + 3]


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
    nothing = NOTHING[precision] if "match" in path else 1e-14
    for name, value in expected_values(path, theirs).items():
        np.testing.assert_allclose(ours[name].mean(), value.mean(), rtol=rtol)
    shrunk = len(own) if feature_gradients_are_smaller(theirs) else 1
    for name in (name for name in ours if name.startswith("grad_")):
        wanted = theirs[name]
        found, wanted = (
            (ours[name].mean(), wanted.mean()) if "logit" in name else (ours[name] / shrunk, wanted)
        )
        allowed = largest * np.abs(wanted).max() + nothing
        np.testing.assert_allclose(found, wanted, rtol=0, atol=allowed, err_msg=name)


HEADS = [(path, size) for size in HEAD_SIZES for path in head_files(size)]


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(("path", "world_size"), HEADS)
def test_recipe_with_a_head(path: str, world_size: int, precision: str) -> None:
    """The global mean on every rank; features' gradients are the ranks times those of the mean,
    and the head's rows move by its gradient, whole, over all of the table.

    The published eight slots report the mean and return the gradient of the sum, so it is the
    mean's that is compared. Partial FC's values have a floor for each row, which ours have not.
    """
    theirs = golden(path)
    ranks = [rank[f"{path} {precision}"] for rank in results(world_size)]
    rtol, largest = TOLERANCES[precision]
    if precision == "float32" and float(theirs["scale"]) > 20:
        largest = MARGINS
    value, features, table = published(path, theirs)
    for ours in ranks:
        np.testing.assert_allclose(ours["loss"], value, rtol=rtol)
    for name, wanted in (("grad_features", features), ("grad_weight", table)):
        found = np.concatenate([ours[name] for ours in ranks])
        found = found / world_size if name == "grad_features" else found
        allowed = largest * np.abs(wanted).max() + 1e-14
        np.testing.assert_allclose(found, wanted, rtol=0, atol=allowed, err_msg=name)


def published(path: str, theirs: dict[str, np.ndarray]) -> tuple[float, np.ndarray, np.ndarray]:
    """Value, and gradients of the global mean in features and rows."""
    if "ov8" in path:
        features = theirs["grad_features_of_mean_fp64"]
        value = float(theirs["loss_fp64_without_floor"])
        return value, np.concatenate(features), theirs["grad_weight_of_mean_fp64"]
    if path.startswith("mlcd"):
        return float(theirs["loss"]), theirs["grad_features"], theirs["grad_weight"]
    rows = rows_of_cross_entropy(theirs)
    np.testing.assert_allclose(np.minimum(rows, FLOOR).mean(), theirs["loss"], rtol=1e-9)
    features = np.concatenate(theirs["grad_features"]) / float(theirs["world_size"])
    return float(rows.mean()), features, theirs["grad_weight"]


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
    if "affinity" in path:
        return {"loss": theirs["loss_mean2"], "term distill": theirs["loss_mean2"]}
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
