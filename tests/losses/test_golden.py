"""The losses against arrays that the published code of CLIP, SigLIP and ProtoCLIP computed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from tests.losses import rank_cases
from tests.losses.rank_cases import golden, golden_names, results, world_size_of
from trainer.comm import Comm
from trainer.losses.constant_prototypes import prototype_cross_entropy, prototype_table

CLIP = golden_names("open_clip/clip_infonce_*.npz")
SIGLIP = golden_names("open_clip/siglip_*.npz")
TERMS = golden_names("protoclip/protoloss_*.npz")
STEPS = golden_names("protoclip/step_*.npz")
AFFINITIES = golden_names("tinyclip/affinity_*.npz")


def assert_gradient(ours: np.ndarray, theirs: np.ndarray) -> None:
    largest = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-8 * largest + 1e-14)


def assert_value(ours: np.ndarray | float, theirs: np.ndarray | float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=0)


def by_rank(path: str) -> Mapping[str, np.ndarray]:
    """Our results of one case with a leading axis of ranks, as in the files."""
    ranks = [cases[path] for cases in results(world_size_of(path))]
    names = [name for name in ranks[0] if name.startswith(("loss", "grad_"))]
    return {name: np.stack([rank[name] for rank in ranks]) for name in names}


def test_all_files_are_here() -> None:
    assert (len(CLIP), len(SIGLIP), len(TERMS), len(STEPS)) == (8, 5, 7, 4)
    assert len(AFFINITIES) == 3


def test_a_case_reads_and_starts_its_own_family_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def told(path: str) -> dict[str, np.ndarray]:
        read.append(path)
        return golden(path)

    monkeypatch.setattr(rank_cases, "golden", told)
    alone = [path for path in SIGLIP if world_size_of(path) == 1]
    found = rank_cases.every_case(Comm.solo(), rank_cases.family_of(alone[0]))
    assert sorted(found) == sorted(read) == sorted(alone)


@pytest.mark.parametrize("path", CLIP)
def test_info_nce(path: str) -> None:
    """The original has four modes of gathering; ours is "own rows, gradient through keys".

    Scoring all rows on every rank gives the mean of our values and scale gradients. Without
    gradient through the gathered rows, feature gradients are smaller by the number of ranks, or
    (own rows only) lack the key side; the latter is run with a Comm that drops that side.
    """
    theirs, ours = golden(path), by_rank(path)
    whole_batch = not theirs["local_loss"]
    shrunk = len(ours["loss"]) if whole_batch and not theirs["gather_with_grad"] else 1
    for name in ("loss", "grad_logit_scale"):
        value = ours[name].mean() if whole_batch else ours[name]
        assert_value(value, theirs[name])
    assert_gradient(ours["grad_image"] / shrunk, theirs["grad_image"])
    assert_gradient(ours["grad_text"] / shrunk, theirs["grad_text"])


@pytest.mark.parametrize("path", SIGLIP)
def test_sigmoid(path: str) -> None:
    """The original's convention is ours: rank values, gradients of their sum."""
    theirs, ours = golden(path), by_rank(path)
    assert_value(ours["loss"], theirs["loss"])
    for name in ("grad_image", "grad_text", "grad_logit_scale", "grad_logit_bias"):
        assert_gradient(ours[name], theirs[name])


@pytest.mark.parametrize("path", AFFINITIES)
def test_affinities_of_tinyclip(path: str) -> None:
    """Both directions and their half sum; where the student is its teacher, the entropy is left."""
    theirs, ours = golden(path), by_rank(path)
    for which in ("img2text", "text2img", "mean2"):
        assert_value(ours[f"loss_{which}"], theirs[f"loss_{which}"])
        for name in ("grad_image", "grad_text"):
            assert_gradient(ours[f"{name}_{which}"], theirs[f"{name}_{which}"])
        scale = f"grad_logit_scale_{which}"
        np.testing.assert_allclose(ours[scale], theirs[scale], rtol=1e-8, atol=1e-14)
    said = [cases[path] for cases in results(world_size_of(path))]
    divergence = np.array([float(rank["divergence"]) for rank in said])
    entropy = np.array([float(rank["entropy"]) for rank in said])
    assert_value(divergence + entropy, theirs["loss_mean2"])
    if "match" in path:
        assert abs(divergence) < 1e-12
    else:
        assert divergence.min() > 0.01


@pytest.mark.parametrize("path", TERMS)
def test_prototype_term(path: str) -> None:
    arrays = {name: torch.from_numpy(value) for name, value in golden(path).items()}
    features = arrays["student_features"].requires_grad_()
    scale = arrays["logit_scale_proto"].requires_grad_()
    count = len(arrays["student_prototypes"])
    table = prototype_table(
        arrays["student_prototypes"],
        arrays["teacher_centroids"],
        valid=torch.ones(count, dtype=torch.bool),
        num_prototypes=count,
        temperature=float(arrays["teacher_temperature"]),
        comm=Comm.solo(),
    )
    loss = prototype_cross_entropy(features, arrays["labels"], table, scale, Comm.solo())
    loss.backward()
    assert_value(loss.detach().numpy(), arrays["loss"].numpy())
    assert_gradient(features.grad.numpy(), arrays["grad_student_features"].numpy())
    assert_gradient(scale.grad.numpy(), arrays["grad_logit_scale_proto"].numpy())


@pytest.mark.parametrize("path", STEPS)
def test_protoclip_step(path: str) -> None:
    """Translation, tables and the total of all terms, sharded over the file's number of ranks.

    Every rank of the original holds the whole batch's loss: the mean of ours. Its default lets
    no gradient through gathered rows, so its feature gradients are ours over the ranks.
    """
    theirs, ours = golden(path), by_rank(path)
    shrunk = 1 if theirs["gather_with_grad"] else len(ours["loss"])
    for name in theirs:
        if name.startswith("table_"):
            np.testing.assert_allclose(joined_rows(path, name), theirs[name], atol=1e-9)
        elif name.startswith(("loss", "grad_logit")):
            assert_value(ours[name].mean(), theirs[name])
        elif name.startswith("grad_"):
            assert_gradient(ours[name] / shrunk, theirs[name])


def joined_rows(path: str, name: str) -> np.ndarray:
    return np.concatenate([cases[path][name] for cases in results(world_size_of(path))])
