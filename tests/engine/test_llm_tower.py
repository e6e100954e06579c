"""A language model as text tower: frozen, whole or with low-rank additions, checkpointed, at every
ZeRO stage. The combination takes the steps that plain PyTorch takes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

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

GLOBAL_BATCH = 8
STEPS = 2
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
MODES: dict[str, dict[str, object]] = {
    "frozen": {"trained": False, "pooling": "last"},
    "whole": {"pooling": "mean"},
    "additions": {"pooling": "last", "lora": {"rank": 4}},
}


class Case(NamedTuple):
    mode: str
    stage: str
    passes: int
    checkpointing: bool = True


CASES = [Case(mode, stage, 2) for mode in MODES for stage in STAGES]
CASES += [Case(mode, "zero3", 1, checkpointing=False) for mode in MODES]


def model_of(path: str, mode: str) -> TwoTower:
    config = small_config(text={"path": path, **MODES[mode]}, embed_dim=16)
    return build_two_tower(config, word_tokenizer(), seed=3)


def batches_of(step: int, comm: Comm, passes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=generator)
    tokens = torch.randint(3, 60, (GLOBAL_BATCH, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.randint(2, LENGTH, (GLOBAL_BATCH, 1), generator=generator)
    rows = torch.arange(GLOBAL_BATCH).chunk(comm.world_size)[comm.rank].chunk(passes)
    return [Batch(images[r], tokens[r], mask[r], r) for r in rows]


def loss_of(comm: Comm):
    def losses(features: Features, batch: Batch) -> Losses:
        clip = info_nce(features.image, features.text, features.logit_scale, comm)
        return Losses.of(clip=clip)

    return losses


def reference(path: str, mode: str) -> dict[str, Tensor]:
    """One process, the whole batch, no DeepSpeed, no checkpointing."""
    from trainer.engine.groups import parameter_groups

    comm, model = Comm.solo(), model_of(path, mode)
    groups = parameter_groups(model.named_parameters(), OPTIM, model.parameter_depth)
    optimizer = torch.optim.AdamW(groups, betas=OPTIM.betas, eps=OPTIM.epsilon)
    for step in range(STEPS):
        (batch,) = batches_of(step, comm, 1)
        loss_of(comm)(model(batch), batch).total.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, OPTIM.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor(step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters()}


def train_everywhere(comm: Comm, path: str, cases: list[Case]) -> list[dict[str, Tensor]]:
    from trainer.engine.zero import Engine

    results = []
    for case in cases:
        model = model_of(path, case.mode)
        model.gradient_checkpointing(case.checkpointing)
        stage = CONFIGS / f"{case.stage}.json"
        engine = Engine(model, OPTIM, comm, deepspeed_config=stage, micro_batch=1)
        for step in range(STEPS):
            accumulate(engine, loss_of(comm), batches_of(step, comm, case.passes))
            assert engine.step(factor(step)), case
        results.append(engine.gathered_weights())
    return results


def test_every_mode_stage_and_split_takes_the_plain_steps(tmp_path: Path) -> None:
    """To a hundredth of what two steps move; and what is frozen keeps every bit."""
    path = save_llama(tmp_path)
    expected = {mode: reference(path, mode) for mode in MODES}
    ranks = run_ranks(train_everywhere, 2, path, CASES, timeout_seconds=900)
    for case, weights in zip(CASES, ranks[0], strict=True):
        start = dict(model_of(path, case.mode).named_parameters())
        for name, value in expected[case.mode].items():
            difference = float((weights[name] - value).abs().max())
            assert difference <= 2e-5, (case, name, difference)
            stays = not start[name].requires_grad
            assert torch.equal(weights[name], start[name].detach()) == stays, (case, name)
