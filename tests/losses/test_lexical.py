"""Lexical vectors and usage penalties against arrays of the published formulas, and by algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.losses.rank_cases import golden
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.kernels.patch_maximum import patch_maximum
from trainer.losses.contrastive import info_nce
from trainer.losses.lexical import elu1p, largest_sparse, lexical_rows, threshold_sparse
from trainer.losses.usage import UsageKind, usage_penalty, warm_up

SOLO = Comm.solo()


def arrays(name: str, *, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    found = {key: torch.from_numpy(value) for key, value in golden(f"lexvla/{name}.npz").items()}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def assert_near(ours: Tensor, theirs: Tensor, *, tolerance: float = 1e-9) -> None:
    largest = float(theirs.abs().max())
    np.testing.assert_allclose(ours.detach(), theirs, rtol=0, atol=tolerance * largest)


def test_activation_and_its_slope() -> None:
    given = arrays("elu1p")
    x = given["x"].requires_grad_()
    y = elu1p(x)
    y.sum().backward()
    assert_near(y, given["y"])
    assert_near(x.grad, given["dy_dx"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_vector_of_a_text(dtype: torch.dtype, tolerance: float) -> None:
    given = arrays("text_lexical_vector", dtype=dtype)
    hidden, words = given["hidden"].requires_grad_(), given["codebook"].requires_grad_()
    rows = lexical_rows(hidden @ words.T)
    (given["probe"] * rows).sum().backward()
    assert_near(rows, given["lexical"], tolerance=tolerance)
    assert_near(hidden.grad, given["grad_hidden"], tolerance=tolerance)
    assert_near(words.grad, given["grad_codebook"], tolerance=tolerance)
    sparse = threshold_sparse(rows)
    assert_near(sparse, given["lexical_sparse"], tolerance=tolerance)
    assert torch.equal((sparse > 0).sum(dim=1), given["active_count"])


@pytest.mark.parametrize("block_words", [None, 1, 7, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_vector_of_an_image(dtype: torch.dtype, tolerance: float, block_words: int | None) -> None:
    given = arrays("image_lexical_vector", dtype=dtype)
    patches, words = given["patch_hidden"].requires_grad_(), given["codebook"].requires_grad_()
    rows = lexical_rows(patch_maximum(patches, words, block_words=block_words))
    (given["probe"] * rows).sum().backward()
    assert_near(rows, given["lexical"], tolerance=tolerance)
    assert_near(patches.grad, given["grad_patch_hidden"], tolerance=tolerance)
    assert_near(words.grad, given["grad_codebook"], tolerance=tolerance)
    each = torch.stack([lexical_rows(patches[:, p] @ words.T) for p in range(patches.shape[1])], 1)
    assert_near(each, given["patch_lexical"], tolerance=tolerance)


@pytest.mark.parametrize("name", ["loss_tau001", "loss_tau007"])
def test_loss_and_its_gradients(name: str) -> None:
    given = arrays(name)
    image, text = given["image_lexical"].requires_grad_(), given["text_lexical"].requires_grad_()
    log_scale = (-given["temperature"].log()).requires_grad_()
    both = 2 * info_nce(image, text, log_scale.exp(), SOLO)
    penalties = {
        side: usage_penalty(rows, SOLO) for side, rows in (("image", image), ("text", text))
    }
    total = both
    for side, value in penalties.items():
        total = total + given[f"lambda_{side}"] * value
        assert_near(value, given[f"overuse_{side}"])
        rows = image if side == "image" else text
        assert_near(usage_penalty(rows, SOLO, kind="flops"), given[f"flops_{side}"])
    total.backward()
    assert_near(both, given["loss_i2t"] + given["loss_t2i"])
    assert_near(total, given["loss_total"])
    assert_near(image.grad, given["grad_image_lexical"], tolerance=1e-8)
    assert_near(text.grad, given["grad_text_lexical"], tolerance=1e-8)
    assert_near(log_scale.grad, given["grad_log_scale"], tolerance=1e-8)


def test_penalties_of_special_batches() -> None:
    given = arrays("overuse_special_cases")
    count, words = int(given["batch"]), int(given["vocab"])
    one = torch.eye(words, dtype=torch.float64)
    batches = {
        "collapsed": one[:1].expand(count, -1),
        "distinct_onehot": one[:count],
        "uniform": torch.full((count, words), 1 / math.sqrt(words), dtype=torch.float64),
    }
    for name, rows in batches.items():
        ours = [usage_penalty(rows, SOLO), usage_penalty(rows, SOLO, kind="flops")]
        assert_near(torch.stack(ours), given[name])
    assert_near(usage_penalty(given["text_lexical"], SOLO), given["overuse_global"])
    halves = [usage_penalty(half, SOLO) for half in given["text_lexical"].chunk(2)]
    assert_near(torch.stack(halves).mean(), given["overuse_mean_of_two_halves"])
    factors = [warm_up(int(step), int(given["warmup_steps"])) for step in given["steps"]]
    np.testing.assert_allclose(factors, given["lambda_factor"])
    assert warm_up(0, 0) == 1.0
    assert float(usage_penalty(torch.zeros(2, 5), SOLO)) == 0.0


def penalties_of_a_share(comm: Comm) -> dict[str, np.ndarray]:
    rows = arrays("overuse_special_cases")["text_lexical"].repeat(2, 1)
    assert len(rows) % comm.world_size == 0
    share = rows.chunk(comm.world_size)[comm.rank]
    rows = share.clone().requires_grad_()
    value = usage_penalty(rows, comm)
    value.backward()
    assert rows.grad is not None
    return {"value": value.detach().numpy(), "gradient": (rows.grad / comm.world_size).numpy()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_penalty_of_the_global_batch_on_one_rank_and_on_several(world_size: int) -> None:
    """Gradients are those of the mean of the ranks' losses, as the engine makes them."""
    alone = penalties_of_a_share(SOLO)
    ranks = run_ranks(penalties_of_a_share, world_size, timeout_seconds=200)
    for rank in ranks:
        np.testing.assert_allclose(rank["value"], alone["value"], rtol=1e-12)
    gradients = np.concatenate([rank["gradient"] for rank in ranks])
    np.testing.assert_allclose(gradients, alone["gradient"], rtol=1e-12)


def test_maximum_before_or_after_the_activation_and_of_one_patch() -> None:
    generator = torch.Generator().manual_seed(5)
    patches = torch.randn(3, 4, 6, generator=generator)
    words = torch.randn(11, 6, generator=generator)
    after = elu1p(patches @ words.T).amax(dim=1)
    assert torch.equal(elu1p((patches @ words.T).amax(dim=1)), after)
    alone = lexical_rows(patch_maximum(patches[:, :1], words))
    torch.testing.assert_close(alone, lexical_rows(patches[:, 0] @ words.T))


def test_of_patches_that_tie_the_first_has_the_gradient() -> None:
    patches = torch.ones(1, 3, 2, requires_grad=True)
    patch_maximum(patches, torch.eye(2)).sum().backward()
    assert patches.grad is not None
    assert patches.grad[0].tolist() == [[1, 1], [0, 0], [0, 0]]


def test_sparse_forms() -> None:
    rows = lexical_rows(torch.randn(5, 30, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(largest_sparse(rows, 30), rows)
    kept = largest_sparse(rows, 4)
    assert ((kept > 0).sum(dim=1) == 4).all()
    assert (kept.amax(dim=1) == rows.amax(dim=1)).all()
    uniform = lexical_rows(torch.zeros(2, 16))
    assert not threshold_sparse(uniform).any()
    strict = (threshold_sparse(rows) > 0).sum(dim=1)
    assert ((strict >= 1) & (strict < 30)).all()


def test_the_activation_meets_itself_at_zero_and_never_falls() -> None:
    near = torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64, requires_grad=True)
    values = elu1p(near)
    values.sum().backward()
    assert float(values[1].detach()) == 1.0
    torch.testing.assert_close(values, torch.ones(3).double(), rtol=0, atol=2e-9)
    torch.testing.assert_close(near.grad, torch.ones(3).double(), rtol=0, atol=2e-9)
    many = elu1p(torch.linspace(-30, 30, 20_001))
    assert (many.diff() >= 0).all()
    assert (many > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_activation_after_the_maximum_has_the_gradients_of_the_one_before(
    dtype: torch.dtype,
) -> None:
    """The fused form, whose slope is told by its value, against autograd; to the bit."""
    draw = torch.Generator().manual_seed(8)
    parts = [torch.randn(*shape, generator=draw).to(dtype) for shape in ((4, 5, 7), (23, 7))]
    probe = torch.randn(4, 23, generator=draw)
    found = []
    for fused in (True, False):
        patches, words = (part.clone().requires_grad_() for part in parts)
        rows = patch_maximum(patches, words, activated=fused, block_words=9)
        if not fused:
            rows = elu1p(rows.to(torch.promote_types(dtype, torch.float32)))
        (rows * probe).sum().backward()
        found.append((rows.detach(), patches.grad, words.grad))
    assert (found[0][0] < 1).any()
    for ours, wanted in zip(*found, strict=True):
        assert torch.equal(ours, wanted)


def test_overuse_is_never_below_flops_and_both_are_of_degree_two() -> None:
    """Chebyshev's inequality, with equality for equal use alone; and the form of equation 8."""
    draw = torch.Generator().manual_seed(4)
    for spread in (0.0, 0.1, 3.0):
        rows = lexical_rows(spread * torch.randn(6, 40, generator=draw).double())
        over, flops = (float(usage_penalty(rows, SOLO, kind=kind)) for kind in KINDS)
        assert over >= flops * (1 - 1e-12)
        assert (over == pytest.approx(flops, rel=1e-12)) == (spread == 0)
        for kind in KINDS:
            thrice = float(usage_penalty(3 * rows, SOLO, kind=kind))
            assert thrice == pytest.approx(9 * float(usage_penalty(rows, SOLO, kind=kind)))
        used = rows.mean(dim=0)
        weights = used / used.sum()
        assert over == pytest.approx(float(40 * (weights * used.square()).sum()), rel=1e-12)


KINDS: tuple[UsageKind, ...] = ("overuse", "flops")


def test_all_words_and_no_threshold_are_the_dense_product() -> None:
    draw = torch.Generator().manual_seed(6)
    images, texts = (lexical_rows(torch.randn(count, 50, generator=draw)) for count in (12, 9))
    dense = texts @ images.T
    assert torch.equal(largest_sparse(texts, 50) @ largest_sparse(images, 50).T, dense)
    rough = threshold_sparse(texts) @ threshold_sparse(images).T
    assert not torch.equal(rough, dense)
    assert (rough <= dense + 1e-6).all()
