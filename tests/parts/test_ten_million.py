"""Ten million prototypes on one machine: real steps, and what they hold besides the table."""

from __future__ import annotations

import pytest
import torch

from trainer.bench.memory import peak_resident_bytes
from trainer.comm import Comm
from trainer.losses.multilabel import MultilabelOptions
from trainer.losses.one_pass import one_pass_multilabel_loss
from trainer.parts.prototype_head import PrototypeHead, PrototypeHeadConfig

COUNT, DIM, BATCH = 10_000_000, 64, 64


@pytest.mark.slow
def test_a_head_of_ten_million_rows_learns_in_this_machine_s_memory():
    config = PrototypeHeadConfig(sample_rate=0.1, learning_rate=0.01)
    head = PrototypeHead(config, num_prototypes=COUNT, dim=DIM, comm=Comm.solo(), seed=1)
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(BATCH, DIM, generator=generator)
    labels = torch.randint(COUNT, (BATCH, 8), generator=generator)
    table = COUNT * DIM * 4
    before = head.rows[labels.flatten()].clone()
    terms = []

    def step(number: int) -> None:
        leaf = features.clone().requires_grad_()
        active = head.active(labels, number)
        result = one_pass_multilabel_loss(leaf, labels, active, head.comm, MultilabelOptions())
        result.loss.backward()
        assert leaf.grad is not None
        head.after_step(number, applied=head.gradients_finite(), learning_rate_factor=1.0)
        terms.append(float(result.figures["positive_term"]))

    peaks = [peak_resident_bytes(lambda number=number: step(number)) for number in range(3)]
    print(f"positive term {terms}; peaks {[round(p / 2**30, 2) for p in peaks]} GiB")
    assert max(peaks) < table / 2
    assert not torch.equal(head.rows[labels.flatten()], before)
    assert terms[2] < terms[0]
    counts = head._optimizer.steps[labels.flatten()]
    assert bool((counts == 3).all())
    drawn = int((head._optimizer.steps > 0).sum())
    assert abs(drawn / COUNT - (1 - 0.9**3)) < 0.001
