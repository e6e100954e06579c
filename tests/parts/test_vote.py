"""A step is taken by the engine and the head together, or by neither (invariants 14 and 26)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.engine.test_zero import GLOBAL_BATCH, OPTIM, STAGES, batch_of, new_engine, small_model
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.losses.contrastive import info_nce
from trainer.losses.learned_prototypes import LogitOptions, prototype_statistics
from trainer.losses.multilabel import MultilabelOptions, multilabel_loss
from trainer.parts.prototype_head import PrototypeHead, PrototypeHeadConfig
from trainer.recipe import Part, WithoutPhases
from trainer.types import Batch, Features, Losses, Progress

CONFIG = RunConfig.model_construct(optim=OPTIM.model_copy(update={"warmup_steps": 2}), steps=20)
NUM_PROTOTYPES = 13
OPTIONS = MultilabelOptions(logits=LogitOptions(scale=10.0))


class Recipe(WithoutPhases):
    """CLIP, and MLCD with labels made of the sample's id. `poison` turns one gradient to NaN."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.model = small_model(comm)
        self.head = PrototypeHead(
            PrototypeHeadConfig(sample_rate=0.5, clip_norm=0.7),
            num_prototypes=NUM_PROTOTYPES,
            dim=8,
            comm=comm,
            seed=2,
        )
        self.parts = {"head": self.head}
        self.poison = ""

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        labels = torch.stack([batch.sample_id * k % NUM_PROTOTYPES for k in (3, 5)], dim=1)
        active = self.head.active(labels, step)
        statistics = prototype_statistics(
            features.image_projected, labels, active, self.head.comm, OPTIONS.logits
        )
        self._poison(active.rows, "head")
        self._poison(features.text, "engine")
        clip = info_nce(features.image, features.text, features.logit_scale, self.comm)
        return Losses.of(clip=clip, mlcd=multilabel_loss(statistics, OPTIONS).loss)

    def _poison(self, tensor: Tensor, place: str) -> None:
        if self.poison == place and self.comm.rank == self.comm.world_size - 1:
            tensor.register_hook(lambda gradient: gradient * torch.nan)


def everything(engine, recipe: Recipe) -> dict[str, Tensor]:
    held = engine.weights_share() | engine.moments_share() | recipe.head._fields()
    return {name: value.clone() for name, value in held.items()}


def steps(comm: Comm, stage: str, poisons: tuple[str, ...], passes: int) -> dict[str, Any]:
    """Three steps, and after the second one those that must not happen."""
    from trainer.running.steps import train_step

    recipe = Recipe(comm)
    assert isinstance(recipe.head, Part)
    engine = new_engine(comm, stage, recipe.model.state_dict())
    engine.module.eval()
    progress, moved, norms = Progress(), [], []

    def step(number: int) -> bool:
        batches = batch_of(number, comm, passes)
        return train_step(engine, recipe, batches, progress, CONFIG)[1]

    for number in range(3):
        applied = step(number)
        assert applied, f"{stage}: step {number}, norm {engine.gradient_norm}"
        progress = progress.advance(samples=GLOBAL_BATCH, applied=applied)
        for recipe.poison in poisons if number == 1 else ():
            before = everything(engine, recipe)
            assert not step(9)
            after = everything(engine, recipe)
            moved += [n for n in before if not torch.equal(before[n], after[n])]
            norms.append(float(engine.gradient_norm))
        recipe.poison = ""
    rows = recipe.head.comm.gather_rows(recipe.head.rows).clone()
    return {"moved": moved, "norms": norms, "rows": rows, "weights": engine.gathered_weights()}


def every_stage(comm: Comm, poisons: tuple[str, ...]) -> list[dict[str, Any]]:
    return [steps(comm, stage, poisons, passes=1) for stage in STAGES]


def alone(comm: Comm) -> list[dict[str, Any]]:
    return [steps(comm, "zero0", (), passes=1), steps(comm, "zero2", (), passes=3)]


@cache
def on_one_rank() -> list[dict[str, Any]]:
    return run_ranks(alone, 1)[0]


def check_end(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found["rows"], expected["rows"], rtol=1e-3, atol=1e-5)
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=1e-3, atol=1e-5)


def test_a_gradient_that_is_not_finite_stops_all_ranks_engine_and_head():
    """One rank's, in the head or in the engine; afterwards the run goes on as if never stopped."""
    for rank in run_ranks(every_stage, 2, ("head", "engine"), timeout_seconds=400):
        for stage, found in zip(STAGES, rank, strict=True):
            assert found["moved"] == [], stage
            assert all(norm != norm for norm in found["norms"]), stage
            if found["weights"]:
                check_end(found, on_one_rank()[0])


def test_micro_batches_do_not_change_the_step_of_the_head():
    check_end(on_one_rank()[1], on_one_rank()[0])
