"""Every ZeRO stage, world size and split of the batch takes the same steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import OptimConfig
from trainer.data.tokenize import train_tokenizer
from trainer.engine.accumulate import accumulate
from trainer.errors import ConfigError
from trainer.losses.contrastive import info_nce
from trainer.models.two_tower import HeadConfig, TowerConfig, TwoTowerConfig, build_two_tower
from trainer.types import Batch, Features, Losses

GLOBAL_BATCH = 12
OPTIM = OptimConfig(learning_rate=3e-3, weight_decay=0.1, clip_norm=0.5, layer_decay=0.9)
CONFIGS = Path(__file__).parents[2] / "ds_configs"


def small_model(comm: Comm):
    tower = {"width": 32, "layers": 2, "heads": 2}
    config = TwoTowerConfig(
        image_size=32,
        patch_size=16,
        text_length=8,
        vocabulary=300,
        embed_dim=16,
        image=TowerConfig(**tower),
        text=TowerConfig(**tower),
        head=HeadConfig(hidden=24, dim=8, norm="layer"),
    )
    tokenizer = train_tokenizer(["one two three", "four five"], vocab_size=300, length=8)
    return build_two_tower(config, tokenizer, comm, seed=3)


def batch_of(step: int, comm: Comm, passes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=generator)
    tokens = torch.randint(3, 60, (GLOBAL_BATCH, 8), generator=generator)
    rows = torch.arange(GLOBAL_BATCH).chunk(comm.world_size)[comm.rank].chunk(passes)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return [Batch(images[r], tokens[r], mask[r], r) for r in rows]


def loss_of(comm: Comm):
    def losses(features: Features, batch: Batch) -> Losses:
        clip = info_nce(features.image, features.text, features.logit_scale, comm)
        drawn = (features.image_projected - features.text_projected).square().sum(1).mean()
        return Losses.of(clip=clip, heads=drawn * features.prototype_scale)

    return losses


def reference(steps: int) -> tuple[dict[str, Tensor], list[float]]:
    """The plainest loop: one process, the whole batch, torch's own AdamW and clipping.

    Weights, and the gradient's norm before each step.
    """
    from trainer.engine.groups import parameter_groups

    comm = Comm.solo()
    model = small_model(comm)
    groups = parameter_groups(model.named_parameters(), OPTIM, model.parameter_depth)
    optimizer = torch.optim.AdamW(groups, betas=OPTIM.betas, eps=OPTIM.epsilon)
    norms = []
    for step in range(steps):
        (batch,) = batch_of(step, comm, 1)
        loss_of(comm)(model(batch), batch).total.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)))
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor(step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.state_dict().items()}, norms


def factor(step: int) -> float:
    return 1.0 / (1 + step)


def new_engine(comm: Comm, stage: str, weights: dict[str, Tensor] | None = None, bf16=False):
    from trainer.engine.zero import Engine

    model = small_model(comm)
    model.gradient_checkpointing(True)
    if weights:
        model.load_state_dict(weights)
    path = CONFIGS / f"{stage}.json"
    if bf16:
        values = json.loads(path.read_text()) | {"bf16": {"enabled": True}}
        path = Path(f"/tmp/{stage}-bf16-{comm.rank}.json")
        path.write_text(json.dumps(values))
    return Engine(model, OPTIM, comm, deepspeed_config=path, micro_batch=1)


def run_steps(engine, comm: Comm, steps: range, passes: int) -> list[float]:
    norms = []
    for step in steps:
        accumulate(engine, loss_of(comm), batch_of(step, comm, passes))
        assert engine.step(factor(step))
        norms.append(float(engine.gradient_norm))
    return norms


def train_everywhere(comm: Comm, cases: list[tuple[str, int]], steps: int) -> list[dict]:
    results = []
    for stage, passes in cases:
        engine = new_engine(comm, stage)
        norms = run_steps(engine, comm, range(steps), passes)
        weights = engine.gathered_weights()
        share = engine.weights_share() | engine.moments_share()
        held = engine.bytes_per_rank()
        results.append({"weights": weights, "share": share, "bytes": held, "norms": norms})
    return results


STAGES = ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_stage_rank_count_and_split_takes_the_same_steps(world_size):
    cases = [(stage, 1 if world_size == 3 else 2) for stage in STAGES] + [("zero3", 1)]
    expected, norms = reference(3)
    assert min(norms) > OPTIM.clip_norm, "every step is clipped"
    ranks = run_ranks(train_everywhere, world_size, cases, 3, timeout_seconds=400)
    for index, case in enumerate(cases):
        weights = ranks[0][index]["weights"]
        assert weights.keys() == expected.keys()
        for result in (rank[index] for rank in ranks):
            assert result["norms"] == pytest.approx(norms, rel=1e-4), case
        for name, value in expected.items():
            message = f"{case} W={world_size} {name}"
            torch.testing.assert_close(
                weights[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, c=message: f"{c}: {m}"
            )


def poison_one_rank(comm: Comm, stages: list[str]) -> list[dict]:
    """A NaN pixel in one sample of rank 1: nothing may move anywhere, and rank 1 is named."""
    from trainer.log.skipped_step import explain_skip, one_line

    results = []
    for stage in stages:
        engine = new_engine(comm, stage)
        run_steps(engine, comm, range(2), 1)
        before = engine.weights_share() | engine.moments_share()
        batches = batch_of(2, comm, 1)
        if comm.rank == 1:
            batches[0].images[1, 0, 0, 0] = float("nan")
        losses = accumulate(engine, loss_of(comm), batches)
        applied = engine.step(factor(2))
        why = one_line(explain_skip(engine, batches, losses))
        after = engine.weights_share() | engine.moments_share()
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        run_steps(engine, comm, range(2, 3), 1)
        results.append(
            {"applied": applied, "moved": moved, "why": why, "end": engine.gathered_weights()}
        )
    return results


def test_a_nan_on_one_rank_changes_no_parameter_anywhere_and_names_the_rank():
    expected, _ = reference(3)
    ranks = run_ranks(poison_one_rank, 2, STAGES, timeout_seconds=400)
    for index, stage in enumerate(STAGES):
        for rank in ranks:
            assert not rank[index]["applied"], stage
            assert rank[index]["moved"] == [], stage
            assert "rank 1 (pixels of samples 7)" in rank[index]["why"], stage
        for name, value in ranks[0][index]["end"].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_zero_3_holds_a_share_of_weights_and_moments():
    """Bytes per rank are within 5 % of 1 / W (persistence off)."""
    ranks = run_ranks(measure_bytes, 2, timeout_seconds=300)
    total = 4 * sum(p.numel() for p in small_model(Comm.solo()).parameters())
    for rank in ranks:
        assert abs(rank["weights"] / (total / 2) - 1) < 0.05
        assert abs(rank["moments"] / total - 1) < 0.05


def measure_bytes(comm: Comm) -> dict[str, int]:
    engine = new_engine(comm, "zero3")
    run_steps(engine, comm, range(1), 1)
    return engine.bytes_per_rank()


@pytest.mark.parametrize(
    "halves",
    [
        {"fp16": {"enabled": True}},
        {"fp16": {"enabled": "auto"}},
        {"amp": {"enabled": True}},
        {"torch_autocast": {"enabled": True, "dtype": "float16"}},
    ],
)
def test_a_file_that_scales_losses_is_refused_with_the_way_out(tmp_path, halves):
    from trainer.engine.zero import Engine

    path = tmp_path / "fp16.json"
    path.write_text(json.dumps(halves))
    comm = Comm.solo()
    with pytest.raises(ConfigError, match=r"fp16.json turns on .* scales losses.*\"bf16\""):
        Engine(small_model(comm), OPTIM, comm, deepspeed_config=path, micro_batch=1)


def test_bfloat16_takes_steps_at_every_stage():
    """Bfloat16 weights, float32 masters: close to the float32 steps, and restored exactly."""
    (ranks,) = run_ranks(train_in_bfloat16, 1, timeout_seconds=400)
    expected, _ = reference(3)
    for stage, (weights, again) in ranks.items():
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0.1, atol=0.02)
            assert torch.equal(weights[name], again[name]), f"{stage} {name}"


def train_in_bfloat16(comm: Comm) -> dict[str, tuple[dict, dict]]:
    results = {}
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        engine = new_engine(comm, stage, bf16=True)
        run_steps(engine, comm, range(3), 1)
        weights, moments = engine.weights_share(), engine.moments_share()
        other = new_engine(comm, stage, weights, bf16=True)
        other.restore(weights, moments, 3, batch_of(0, comm, 1)[0])
        results[stage] = (weights, other.weights_share())
        for batch_step in range(3, 5):  # the restored engine continues as the first one does
            for one in (engine, other):
                run_steps(one, comm, range(batch_step, batch_step + 1), 1)
        first, second = engine.weights_share(), other.weights_share()
        assert all(torch.equal(first[name], second[name]) for name in first), stage
    return results
