"""SupCon against a double loop over samples, and as a run beside PALM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.curation.corpus import write_outside
from tests.ranks import run_ranks
from tests.recipes.test_mlcd import shards_without_captions
from trainer.comm import Comm
from trainer.config import parse_run
from trainer.errors import ConfigError
from trainer.losses.supcon import supervised_contrast

LABELS = torch.tensor([0, 1, 0, -1, 2, 1, 0, 0, -1, 3, 1, 1])
ROWS = len(LABELS)


def rows() -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return normalize(torch.randn(ROWS, 6, generator=draw, dtype=torch.float64), dim=1)


def naive(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    terms = []
    for i in range(len(labels)):
        others = [a for a in range(len(labels)) if a != i and labels[a] >= 0]
        positives = [p for p in others if labels[i] >= 0 and labels[p] == labels[i]]
        if not positives:
            continue
        scores = {a: features[i] @ features[a] / temperature for a in others}
        partition = torch.stack(list(scores.values())).logsumexp(dim=0)
        terms.append(-torch.stack([scores[p] - partition for p in positives]).mean())
    return torch.stack(terms).mean()


def of_rank(comm: Comm) -> tuple[float, Tensor]:
    share = ROWS // comm.world_size
    own = slice(comm.rank * share, (comm.rank + 1) * share)
    features = rows()[own].requires_grad_()
    loss = supervised_contrast(features, LABELS[own], comm, temperature=0.2)
    loss.backward()
    return loss.item(), features.grad / comm.world_size


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_loss_and_gradients_are_those_of_a_double_loop(world_size):
    """The mean over ranks of unequally many labelled samples is that of the whole batch."""
    features = rows().requires_grad_()
    expected = naive(features, LABELS, 0.2)
    expected.backward()
    found = run_ranks(of_rank, world_size)
    assert sum(loss for loss, _ in found) / world_size == pytest.approx(expected.item(), rel=1e-12)
    gradient = torch.cat([grad for _, grad in found])
    torch.testing.assert_close(gradient, features.grad, rtol=1e-10, atol=1e-12)


def test_large_scores_overflow_nowhere_and_no_class_is_no_loss():
    features = rows().float().requires_grad_()
    loss = supervised_contrast(features, LABELS, Comm.solo(), temperature=1e-3)
    expected = naive(rows(), LABELS, 1e-3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for labels in (torch.full((ROWS,), -1), torch.arange(ROWS)):
        features.grad = None
        loss = supervised_contrast(features, labels, Comm.solo(), temperature=0.1)
        loss.backward()
        assert loss.item() == 0
        assert not features.grad.any()


RUN = """
workdir: {folder}/{name}
steps: 3
global_batch: 12
recipe:
  name: supcon
  model:
    image_size: 32
    patch_size: 16
    embed_dim: 16
    image: {{width: 32, layers: 1, heads: 2}}
    head: {{hidden: 24, dim: 8, norm: layer}}
  classes: subgroup
data: {{train: "{spec}"}}
optim: {{learning_rate: 0.003}}
evals:
  - name: ood
    label: ood
    train: "{first}"
    data: "{second}"
    target: subgroup
    outside: {{other: "{folder}/outside.tar"}}
log_every: 1 steps
"""


def trained(comm: Comm, text: str) -> list[float]:
    from trainer.loop import train

    config = parse_run(text)
    train(config)
    comm.barrier()
    lines = (config.workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["values"]["contrast"] for line in lines]


def test_a_run_takes_the_same_steps_on_one_rank_and_two_and_is_measured_by_ood(tmp_path):
    spec = shards_without_captions(tmp_path)
    first, second = (spec.replace("{000000..000001}", f"00000{number}") for number in (0, 1))
    write_outside(tmp_path / "outside.tar")
    text = RUN.format(folder=tmp_path, name="SIZE", spec=spec, first=first, second=second)
    losses = [run_ranks(trained, size, text.replace("SIZE", str(size)))[0] for size in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 3
    said = [
        [json.loads(line) for line in (tmp_path / size / "events.jsonl").read_text().splitlines()]
        for size in ("1", "2")
    ]
    one, two = ([e for e in events if e["event"] == "ood"][-1] for events in said)
    assert one["outside/other"] == two["outside/other"] == 20
    assert 0 <= one["mahalanobis_auroc/other"] <= 100
    assert one["mahalanobis_auroc/other"] == pytest.approx(two["mahalanobis_auroc/other"], abs=5)


def test_labels_come_from_one_place(tmp_path: Path):
    with pytest.raises(ConfigError, match="give either `labels`, a folder, or `classes`"):
        parse_run(
            RUN.format(folder=tmp_path, name="x", spec="x.tar", first="x.tar", second="y.tar"),
            ["recipe.labels=there"],
        )
