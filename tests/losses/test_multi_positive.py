"""Several texts an image: the published code's arrays, dense float64 forms, special cases."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus

from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.losses.contrastive import info_nce
from trainer.losses.multi_positive import multi_positive_nce, multi_positive_sigmoid
from trainer.losses.sigmoid import sigmoid_loss

GOLDEN = Path(__file__).parent.parent / "golden" / "flame"
SIGMOID = sorted(path.name for path in GOLDEN.glob("mp_sigmoid_*.npz"))
NCE = sorted(path.name for path in GOLDEN.glob("mp_nce_*.npz"))
GLOBAL_BATCH = 12


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name, allow_pickle=False) as file:
        return dict(file)


def measured(
    comm: Comm, kind: str, image: Tensor, text: Tensor, scale: float, bias: float
) -> dict[str, Tensor]:
    """This rank's value, and what its leaves hold after all ranks ran backward together."""
    leaves = {
        "image": image.clone().requires_grad_(),
        "text": text.clone().requires_grad_(),
        "logit_scale": image.new_tensor(scale).requires_grad_(),
        "logit_bias": image.new_tensor(bias).requires_grad_(),
    }
    if kind == "sigmoid":
        loss = multi_positive_sigmoid(*leaves.values(), comm)
    else:
        loss = multi_positive_nce(leaves["image"], leaves["text"], leaves["logit_scale"], comm)
    loss.backward()
    gradients = {f"grad_{n}": leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": loss.detach(), **gradients}


def random_case(count: int, positives: int, dim: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    text = torch.randn(count, positives, dim, generator=generator, dtype=torch.float64)
    return normalize(image, dim=-1), normalize(text, dim=-1)


def on_every_rank(comm: Comm) -> dict[str, dict[str, Tensor]]:
    cases = {}
    for name in SIGMOID + NCE:
        case = arrays(name)
        if case["world_size"] != comm.world_size:
            continue
        image, text = (torch.from_numpy(case[f"{side}_features"]) for side in ("image", "text"))
        grouped = text[comm.rank].unflatten(0, (image.shape[1], int(case["texts_per_image"])))
        kind = "sigmoid" if "sigmoid" in name else "nce"
        bias = float(case.get("logit_bias", 0.0))
        cases[name] = measured(
            comm, kind, image[comm.rank], grouped, float(case["logit_scale"]), bias
        )
    if GLOBAL_BATCH % comm.world_size == 0:
        image, text = random_case(GLOBAL_BATCH, 3)
        mine = torch.arange(GLOBAL_BATCH).chunk(comm.world_size)[comm.rank]
        for kind in ("sigmoid", "nce"):
            cases[kind] = measured(comm, kind, image[mine], text[mine], 20.0, -7.0)
    return cases


@cache
def by_rank(world_size: int) -> list[dict[str, dict[str, Tensor]]]:
    if world_size == 1:
        return [on_every_rank(Comm.solo())]
    return run_ranks(on_every_rank, world_size)


def stacked(case: str, world_size: int) -> dict[str, np.ndarray]:
    ranks = [cases[case] for cases in by_rank(world_size)]
    return {name: torch.stack([rank[name] for rank in ranks]).numpy() for name in ranks[0]}


def assert_gradient(ours: np.ndarray, theirs: np.ndarray) -> None:
    largest = np.abs(theirs).max()
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=0, atol=1e-8 * largest)


def test_all_files_are_here() -> None:
    assert (len(SIGMOID), len(NCE)) == (3, 3)


@pytest.mark.parametrize("name", SIGMOID)
def test_sigmoid_is_the_published_one(name: str) -> None:
    """There the ranks' values are of own images and all texts, here of own texts and all images:
    equal in the mean, and the features' gradients are of the sum on both sides."""
    theirs = arrays(name)
    ours = stacked(name, int(theirs["world_size"]))
    for key in ("loss", "grad_logit_scale", "grad_logit_bias"):
        np.testing.assert_allclose(ours[key].mean(), theirs[key].mean(), rtol=1e-9)
    for key in ("grad_image", "grad_text"):
        assert_gradient(ours[key], theirs[key])


@pytest.mark.parametrize("name", NCE)
def test_nce_is_the_published_one(name: str) -> None:
    """There every rank has the global value; without gradient through the gathered rows the
    features' gradients are smaller by the number of ranks."""
    theirs = arrays(name)
    ours = stacked(name, int(theirs["world_size"]))
    shrunk = 1 if theirs["gather_with_grad"] else len(ours["loss"])
    for key in ("loss", "grad_logit_scale"):
        np.testing.assert_allclose(ours[key].mean(), theirs[key].mean(), rtol=1e-9)
    for key in ("grad_image", "grad_text"):
        assert_gradient(ours[key] / shrunk, theirs[key])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["sigmoid", "nce"])
def test_every_world_size_has_the_dense_value_and_gradient(kind: str, world_size: int) -> None:
    image, text = (rows.requires_grad_() for rows in random_case(GLOBAL_BATCH, 3))
    scale, bias = (torch.tensor(v, dtype=torch.float64).requires_grad_() for v in (20.0, -7.0))
    dense = (
        dense_sigmoid(image, text, scale, bias)
        if kind == "sigmoid"
        else dense_nce(image, text, scale)
    )
    dense.backward()
    ours = stacked(kind, world_size)
    np.testing.assert_allclose(ours["loss"].mean(), dense.item(), rtol=1e-12)
    np.testing.assert_allclose(ours["grad_logit_scale"].mean(), scale.grad.item(), rtol=1e-10)
    assert_gradient(ours["grad_image"] / world_size, image.grad.numpy())
    assert_gradient(ours["grad_text"] / world_size, text.grad.numpy())


def dense_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * image @ text.flatten(0, 1).T + bias
    own = torch.eye(len(image)).repeat_interleave(text.shape[1], dim=1) * 2 - 1
    return softplus(-own * logits).sum() / own.shape[1]


def dense_nce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    count, positives, _ = text.shape
    right = torch.arange(count)
    slots = [cross_entropy(scale * image @ text[:, k].T, right) for k in range(positives)]
    back = cross_entropy(scale * text.flatten(0, 1) @ image.T, right.repeat_interleave(positives))
    return (torch.stack(slots).mean() + back) / 2


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 6), positives=st.integers(1, 4), seed=st.integers(0, 99))
def test_repeated_and_reordered_texts(count: int, positives: int, seed: int) -> None:
    """Each text twice, or the texts of an image in another order: the same value."""
    image, text = random_case(count, positives, seed=seed)
    scale, bias, comm = torch.tensor(15.0).double(), torch.tensor(-9.0).double(), Comm.solo()
    value = multi_positive_sigmoid(image, text, scale, bias, comm)
    for changed in (text.repeat_interleave(2, dim=1), text.flip(1)):
        torch.testing.assert_close(
            multi_positive_sigmoid(image, changed, scale, bias, comm), value, rtol=1e-12, atol=0
        )


def test_one_text_an_image_is_siglip_and_info_nce() -> None:
    image, text = random_case(7, 1)
    scale, bias, comm = torch.tensor(15.0).double(), torch.tensor(-9.0).double(), Comm.solo()
    torch.testing.assert_close(
        multi_positive_sigmoid(image, text, scale, bias, comm),
        sigmoid_loss(image, text[:, 0], scale, bias, comm),
        rtol=1e-12,
        atol=0,
    )
    torch.testing.assert_close(
        multi_positive_nce(image, text, scale, comm),
        info_nce(image, text[:, 0], scale, comm),
        rtol=1e-12,
        atol=0,
    )


def test_the_start_value_and_the_gradient_of_the_bias() -> None:
    """Orthogonal features: softplus(10) + (B - 1) softplus(-10); the other by hand."""
    count, positives = 64, 2
    image = torch.eye(2 * count, dtype=torch.float64)[:count]
    text = torch.eye(2 * count, dtype=torch.float64)[count:, None].expand(-1, positives, -1)
    scale, bias = torch.tensor(10.0).double(), torch.tensor(-10.0).double().requires_grad_()
    loss = multi_positive_sigmoid(image, text, scale, bias, Comm.solo())
    expected = math.log1p(math.exp(10)) + (count - 1) * math.log1p(math.exp(-10))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    sigmoid = 1 / (1 + math.exp(10))
    assert bias.grad is not None
    assert bias.grad.item() == pytest.approx((count - 1) * sigmoid - (1 - sigmoid), rel=1e-12)
