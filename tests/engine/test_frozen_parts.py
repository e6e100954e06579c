"""What is frozen, where, under which stage, checkpointed or not: the plain loop's steps each time.

ZeRO-3 gathers a block whole where all of it learns or none of it, and needs hooks on the gradients
that pass through it; a part that is frozen leaves out some of these gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.engine.test_zero import CONFIGS, OPTIM, factor
from tests.models.small import LENGTH, save_llama, small_config, word_tokenizer
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.engine.accumulate import accumulate
from trainer.losses.contrastive import info_nce
from trainer.models.two_tower import TwoTower, build_two_tower
from trainer.types import Batch, Features, Losses

GLOBAL_BATCH, STEPS = 8, 2

FROZEN: dict[str, Callable[[str], bool]] = {
    "nothing": lambda name: False,
    "embeddings": lambda name: "embed" in name or "pre_layrnorm" in name,
    "all before the last block": lambda name: (
        "embed" in name or "pre_layrnorm" in name or ".layers.0." in name or ".layers.1." in name
    ),
    "a block between": lambda name: ".layers.1." in name,
    "the last block": lambda name: ".layers.2." in name,
    "half of each block": lambda name: ".layers." in name and "mlp" in name,
}
LORA = {"rank": 4}


class Case(NamedTuple):
    frozen: str
    lora: bool
    checkpointing: bool
    stage: str
    views: int

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self._asdict().items())


CASES = [
    *(Case(frozen, False, again, "zero3", 2) for frozen, again in product(FROZEN, (False, True))),
    *(Case(frozen, False, True, "zero2", 1) for frozen in FROZEN),
    *(Case("embeddings", True, again, "zero3", n) for again, n in product((False, True), (1, 2))),
]


def model_of(path: str, case: Case) -> TwoTower:
    text: dict[str, Any] = {"path": path, "pooling": "last"}
    text |= {"lora": LORA} if case.lora else {}
    image = {"width": 32, "layers": 3, "heads": 2}
    config = small_config(text=text, image=image, embed_dim=16)
    model = build_two_tower(config, word_tokenizer(), seed=3)
    for name, parameter in model.named_parameters():
        if FROZEN[case.frozen](name):
            parameter.requires_grad_(False)
    model.gradient_checkpointing(case.checkpointing)
    return model


def batch_of(step: int, comm: Comm, views: int) -> Batch:
    """Further views stand below the first, as a step's views do."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(views, GLOBAL_BATCH, 3, 32, 32, generator=generator)
    tokens = torch.randint(3, 60, (GLOBAL_BATCH, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.randint(2, LENGTH, (GLOBAL_BATCH, 1), generator=generator)
    rows = torch.arange(GLOBAL_BATCH).chunk(comm.world_size)[comm.rank]
    return Batch(images[:, rows].flatten(0, 1), tokens[rows], mask[rows], rows)


def loss_of(comm: Comm, views: int) -> Callable[[Features, Batch], Losses]:
    def losses(features: Features, batch: Batch) -> Losses:
        looks = features.image.chunk(views)
        terms = [info_nce(look, features.text, features.logit_scale, comm) for look in looks]
        return Losses.of(clip=torch.stack(terms).mean())

    return losses


def reference(path: str, case: Case) -> dict[str, Tensor]:
    """One process, the whole batch, no DeepSpeed, no checkpointing."""
    from trainer.engine.groups import parameter_groups

    comm, model = Comm.solo(), model_of(path, case._replace(checkpointing=False))
    groups = parameter_groups(model.named_parameters(), OPTIM, model.parameter_depth)
    optimizer = torch.optim.AdamW(groups, betas=OPTIM.betas, eps=OPTIM.epsilon)
    for step in range(STEPS):
        batch = batch_of(step, comm, case.views)
        loss_of(comm, case.views)(model(batch), batch).total.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, OPTIM.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor(step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters()}


def trained_on_ranks(
    comm: Comm, path: str, folder: Path, cases: list[Case]
) -> list[dict[str, Tensor]]:
    from trainer.engine.zero import Engine

    results = []
    for case in cases:
        file = folder / f"{case.stage}.{comm.rank}.json"
        values = json.loads((CONFIGS / f"{case.stage}.json").read_text())
        # no parameter is so small here that it would stay whole
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        told = case.frozen == "nothing"
        values |= {"wall_clock_breakdown": told, "memory_breakdown": told}
        file.write_text(json.dumps(values))
        model = model_of(path, case)
        engine = Engine(model, OPTIM, comm, deepspeed_config=file, micro_batch=1)
        for step in range(STEPS):
            batch = batch_of(step, comm, case.views)
            accumulate(engine, loss_of(comm, case.views), [batch])
            assert engine.step(factor(step)), case
        results.append(engine.gathered_weights())
        engine._engine.destroy()
    return results


FEW = [
    Case("embeddings", False, True, "zero3", 2),
    Case("half of each block", False, True, "zero3", 2),
    Case("embeddings", True, True, "zero3", 1),
]


@pytest.mark.heavy
@pytest.mark.parametrize("cases", [FEW, pytest.param(CASES, marks=pytest.mark.slow)])
def test_whatever_is_frozen_the_steps_are_the_plain_ones(tmp_path: Path, cases: list[Case]) -> None:
    """To a hundredth of what two steps move; and what is frozen keeps every bit."""
    path = save_llama(tmp_path)
    ranks = run_ranks(trained_on_ranks, 2, path, tmp_path, cases, timeout_seconds=900)
    for case, weights in zip(cases, ranks[0], strict=True):
        start = dict(model_of(path, case).named_parameters())
        for name, value in reference(path, case).items():
            difference = float((weights[name] - value).abs().max())
            assert difference <= 2e-5, (str(case), name, difference)
            stays = not start[name].requires_grad
            assert torch.equal(weights[name], start[name].detach()) == stays, (str(case), name)
