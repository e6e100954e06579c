"""Gradients of micro-batches add up to those of the whole batch, for whatever a model says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer.engine.accumulate import accumulate
from trainer.types import Batch, Features, Losses

ROWS = 12


class Patches(nn.Module):
    """A model with a field of its own for every sample, a scalar, and integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 8).double()
        self.heat = nn.Parameter(torch.tensor(2.0).double())

    def __call__(self, batch: Batch) -> Features:
        assert batch.images is not None
        rows = self.layer(batch.images)
        more = {"patches": rows.unflatten(1, (4, 2)), "heat": self.heat * 3, "best": rows.argmax(1)}
        return Features(image=rows.tanh(), more=more)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def loss_of(features: Features, batch: Batch) -> Losses:
    """Couples all rows, as a contrastive loss does."""
    image, patches = features.tensor("image"), features.tensor("patches")
    similar = image @ image.mT * features.tensor("heat")
    picked = patches.flatten(1).gather(1, features.tensor("best")[:, None])
    return Losses.of(pairs=similar.logsumexp(1).mean(), parts=picked.square().mean().sqrt())


@pytest.mark.parametrize("passes", [2, 3])
def test_a_models_own_features_accumulate_like_the_known_ones(passes):
    torch.manual_seed(1)
    images = torch.randn(ROWS, 6).double()
    ids = torch.arange(ROWS)
    gradients, values = [], []
    for count in (1, passes):
        model = Patches()
        batches = [Batch(images[rows], None, None, rows) for rows in ids.chunk(count)]
        values.append(accumulate(model, loss_of, batches))
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(values[1].total, values[0].total, rtol=1e-12, atol=0.0)
    assert float(gradients[0][0].abs().max()) > 0


def test_a_feature_that_was_not_said_is_named_with_those_that_were():
    features = Features.of({"image": torch.zeros(2, 3), "patches": torch.zeros(2, 4)})
    assert features.more is not None
    with pytest.raises(KeyError, match="no 'text', only image, patches"):
        features.tensor("text")


def test_the_norm_of_a_terms_gradient_is_that_of_the_term_alone():
    """And what goes into the parameters is the gradient of the sum, as without norms."""
    torch.manual_seed(1)
    batch = Batch(torch.randn(ROWS, 6).double(), None, None, torch.arange(ROWS))
    models, said = [Patches(), Patches()], {}
    accumulate(models[0], loss_of, [batch])
    accumulate(models[1], loss_of, [batch], said=said, term_norms=True)
    for plain, by_term in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(by_term.grad, plain.grad, rtol=1e-12, atol=1e-14)
    features = Patches()(batch)
    leaves = [v for v in features.tensors().values() if v.is_floating_point()]
    for name, value in loss_of(features, batch).items():
        alone = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        norm = sum(g.square().sum() for g in alone if g is not None).sqrt()
        assert float(said[f"feature_gradient_norm/{name}"]) == pytest.approx(float(norm), rel=1e-6)
    assert float(said["heat"]) == float(features.tensor("heat").detach())
