"""An average of weights, a changed model and a block that runs twice, under every ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.engine.test_zero import (
    CONFIGS,
    OPTIM,
    STAGES,
    batch_of,
    factor,
    loss_of,
    new_engine,
    run_steps,
    small_model,
)
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import AverageConfig
from trainer.engine.accumulate import accumulate
from trainer.errors import CheckpointError, ConfigError

STEPS = 3
MOMENTUM = AverageConfig(momentum=0.9, final_momentum=0.95)
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor")


@contextmanager
def counting() -> Iterator[list[str]]:
    """The collectives that are started inside, by name."""
    started: list[str] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counted(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            started.append(name)
            return originals[name](*arguments, **options)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name))
    try:
        yield started
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def average_everywhere(comm: Comm, cases: list[tuple[str, bool]]) -> None:
    from trainer.engine.zero import Engine
    from trainer.parts.averaged_weights import AveragedWeights, momentum_at

    for stage, bf16 in cases:
        engine = new_engine(comm, stage, bf16=bf16)
        average = AveragedWeights(MOMENTUM, steps=STEPS)
        average.attach(engine)
        naive = everywhere(engine, comm)
        for step in range(STEPS):
            run_steps(engine, comm, range(step, step + 1), 1)
            with counting() as started:
                average.after_step(step, applied=True, learning_rate_factor=1.0)
            assert started == [], "nothing is sent"
            share = 1.0 - momentum_at(step, STEPS, MOMENTUM)
            for name, value in everywhere(engine, comm).items():
                naive[name].lerp_(value, share)
        before = everywhere(engine, comm)
        average.after_step(STEPS, applied=False, learning_rate_factor=1.0)
        same(gathered(average.state_share(), comm), naive)
        batch = batch_of(9, comm, 1)[0]
        plain = engine.encode(batch).image
        with average.applied():
            same(everywhere(engine, comm), naive)
            averaged = engine.encode(batch).image.float()
        same(everywhere(engine, comm), before)
        assert torch.equal(engine.encode(batch).image, plain), (stage, bf16)
        model = small_model(comm)
        model.load_state_dict(naive, strict=False)
        with torch.no_grad():
            expected = (model.bfloat16() if bf16 else model).eval()(cast(batch, bf16)).image.float()
        bounds = {"rtol": 0.05, "atol": 0.02} if bf16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(averaged, expected, **bounds)
        restored = AveragedWeights(MOMENTUM, steps=STEPS)
        other: Engine = new_engine(comm, "zero1" if stage == "zero3" else "zero3", bf16=bf16)
        restored.attach(other)
        restored.load_state_dict(naive)
        same(gathered(restored.state_share(), comm), naive)
        with pytest.raises(CheckpointError, match="of another model"):
            restored.load_state_dict({"elsewhere": torch.zeros(1)})


def cast(batch: Any, bf16: bool) -> Any:
    return batch._replace(images=batch.images.bfloat16()) if bf16 else batch


def gathered(share: Any, comm: Comm) -> dict[str, Tensor]:
    """The shares of all ranks, on all ranks."""
    mine = dict(share)
    names = comm.gather_json({name: list(value.shape) for name, value in mine.items()})
    whole = {}
    for rank, shapes in enumerate(names):
        for name, shape in shapes.items():
            whole[name] = comm.broadcast(mine.get(name, torch.zeros(shape)), rank)
    return whole


def everywhere(engine: Any, comm: Comm) -> dict[str, Tensor]:
    return gathered(engine.weights_share(), comm)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


AVERAGED = [("zero0", False), ("zero0", True), ("zero1", True), ("zero2", False), ("zero3", True)]
FURTHER = [("zero1", False), ("zero3", False), ("zero3_offload", False)]


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (2, AVERAGED),
        pytest.param(2, FURTHER, marks=pytest.mark.slow),
        pytest.param(1, AVERAGED + FURTHER, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_average_is_the_naive_one_to_the_bit_and_runs_as_a_model(
    world_size: int, cases: list[tuple[str, bool]]
) -> None:
    run_ranks(average_everywhere, world_size, cases, timeout_seconds=600)


def slimmer(comm: Comm) -> tuple[Any, dict[str, Any]]:
    """The small model with a head half as wide, made of every second hidden unit."""
    from trainer.engine.kept import Kept

    whole = small_model(comm)
    half = torch.arange(0, 24, 2)
    config = whole.config.model_copy(
        update={"head": whole.config.head.model_copy(update={"hidden": 12})}
    )
    from trainer.data.tokenize import train_tokenizer
    from trainer.models.two_tower import build_two_tower

    tokenizer = train_tokenizer(["one two three", "four five"], vocab_size=300, length=8)
    model = build_two_tower(config, tokenizer, comm, seed=5)
    keep = {}
    old = {name: value.shape for name, value in whole.named_parameters()}
    for name, value in model.named_parameters():
        dims = [d for d, (a, b) in enumerate(zip(old[name], value.shape, strict=True)) if a != b]
        if dims:
            keep[name] = Kept(name, dict.fromkeys(dims, half))
    assert len(keep) > 4
    return model, keep


def rebuild_everywhere(comm: Comm, stages: list[str]) -> list[dict[str, Tensor]]:
    from trainer.parts.averaged_weights import AveragedWeights, momentum_at

    results = []
    for stage in stages:
        engine = new_engine(comm, stage)
        average = AveragedWeights(MOMENTUM, steps=STEPS)
        average.attach(engine)
        run_steps(engine, comm, range(2), 1)
        average.after_step(1, applied=True, learning_rate_factor=1.0)
        naive = gathered(average.state_share(), comm)
        model, keep = slimmer(comm)
        model.gradient_checkpointing(True)
        engine.rebuild(model, batch_of(0, comm, 1)[0], keep=keep)
        naive = {n: keep[n].of(whole) if n in keep else whole for n, whole in naive.items()}
        same(gathered(average.state_share(), comm), naive)
        weights, moments = engine.weights_share(), engine.moments_share()
        accumulate(engine, loss_of(comm), batch_of(2, comm, 1))
        assert engine.step(factor(2))
        average.after_step(2, applied=True, learning_rate_factor=1.0)
        end = engine.gathered_weights()
        for name, value in everywhere(engine, comm).items():
            naive[name].lerp_(value, 1.0 - momentum_at(2, STEPS, MOMENTUM))
        same(gathered(average.state_share(), comm), naive)
        before = everywhere(engine, comm)
        with average.applied():
            same(everywhere(engine, comm), naive)
        same(everywhere(engine, comm), before)
        again = slimmer(comm)[0]
        again.load_state_dict(gathered(weights, comm))
        from trainer.engine.zero import Engine

        path = CONFIGS / ("zero3.json" if stage == "zero1" else "zero1.json")
        other = Engine(again, OPTIM, comm, deepspeed_config=path, micro_batch=1)
        other.restore(gathered(weights, comm), gathered(moments, comm), 2, batch_of(0, comm, 1)[0])
        run_steps(other, comm, range(2, 3), 1)
        results.append({"end": end, "restored": other.gathered_weights()})
    return results


def sliced_reference() -> dict[str, Tensor]:
    """Torch's own AdamW, its weights and moments cut by hand after two steps."""
    from trainer.engine.groups import parameter_groups

    comm, model = Comm.solo(), small_model(Comm.solo())

    def optimizer_of(one: Any) -> torch.optim.AdamW:
        groups = parameter_groups(one.named_parameters(), OPTIM, one.parameter_depth)
        return torch.optim.AdamW(groups, betas=OPTIM.betas, eps=OPTIM.epsilon)

    def take_step(one: Any, optimizer: torch.optim.AdamW, step: int) -> None:
        (batch,) = batch_of(step, comm, 1)
        loss_of(comm)(one(batch), batch).total.backward()
        torch.nn.utils.clip_grad_norm_(one.parameters(), OPTIM.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor(step)
        optimizer.step()
        optimizer.zero_grad()

    optimizer = optimizer_of(model)
    for step in range(2):
        take_step(model, optimizer, step)
    small, keep = slimmer(comm)
    second = optimizer_of(small)
    old = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        cut = keep[name].of if name in keep else (lambda whole: whole)
        parameter.data.copy_(cut(old[name].data))
        state = optimizer.state[old[name]]
        moments = {key: cut(state[key]).clone() for key in ("exp_avg", "exp_avg_sq")}
        second.state[parameter] = {"step": state["step"].clone(), **moments}
    take_step(small, second, 2)
    return {name: value.detach() for name, value in small.named_parameters()}


@pytest.mark.parametrize(
    ("world_size", "stages"),
    [(2, ["zero0", "zero2", "zero3"]), pytest.param(1, STAGES, marks=pytest.mark.slow)],
)
def test_a_pruned_model_goes_on_as_torch_does_with_moments_cut_by_hand(
    world_size: int, stages: list[str]
) -> None:
    expected = sliced_reference()
    ranks = run_ranks(rebuild_everywhere, world_size, stages, timeout_seconds=600)
    for stage, result in zip(stages, ranks[0], strict=True):
        for name, value in expected.items():
            for which in ("end", "restored"):
                difference = float((result[which][name] - value).abs().max())
                assert difference <= 2e-6, (stage, which, name, difference)


class Twice(torch.nn.Module):
    """Two passes of the image tower over two views."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model
        self.parameter_depth = lambda name: model.parameter_depth(name.removeprefix("inner."))

    def forward(self, batch: Any) -> Any:
        first = self.inner(batch)
        second = self.inner(batch._replace(images=batch.images.flip(3)))
        return first._replace(image=first.image + second.image)


def run_twice(comm: Comm, folder: str) -> dict[str, Any]:
    from trainer.engine.zero import Engine

    results: dict[str, Any] = {}
    for stage in ("zero2", "zero3"):
        for checkpointing in (False, True):
            inner = small_model(comm)
            inner.gradient_checkpointing(checkpointing)
            path = Path(folder) / f"{stage}-{comm.rank}.json"
            path.write_text(json.dumps(json.loads((CONFIGS / f"{stage}.json").read_text())))
            engine = Engine(Twice(inner), OPTIM, comm, deepspeed_config=path, micro_batch=1)
            try:
                engine.encode(batch_of(0, comm, 1)[0])  # without a gradient it may
                accumulate(engine, loss_of(comm), batch_of(0, comm, 1))
                results[f"{stage} {checkpointing}"] = engine.step(1.0)
            except ConfigError as error:
                results[f"{stage} {checkpointing}"] = str(error)
    return results


def test_a_block_that_runs_twice_under_zero_3_is_named_and_elsewhere_trains(tmp_path: Path) -> None:
    (found,) = run_ranks(run_twice, 1, str(tmp_path), timeout_seconds=300)
    for checkpointing in (False, True):
        assert found[f"zero2 {checkpointing}"] is True
        sentence = found[f"zero3 {checkpointing}"]
        assert "runs twice in one pass" in sentence
        assert "torch.cat" in sentence
        assert sentence.startswith("inner.")


def looks_and_steps(comm: Comm) -> list[tuple[bool, bool]]:
    """Whether ZeRO-3 knew to its end what comes next: in a look, and in the pass that trains."""
    engine = new_engine(comm, "zero3")
    average, known = engine.weight_copy().values, []
    coordinator = engine._engine.optimizer.parameter_offload.param_coordinator
    for step in range(4):
        batches = batch_of(step, comm, 1)
        with engine.running_on(average):
            engine.encode(batches[0])
        looked = coordinator.is_complete_trace()
        accumulate(engine, loss_of(comm), batches)
        known.append((looked, coordinator.is_complete_trace()))
        assert engine.step(factor(step))
    return known


def test_looks_and_steps_that_take_turns_both_fetch_ahead() -> None:
    """At the latest from the third on: those before are learned from."""
    for known in run_ranks(looks_and_steps, 2, timeout_seconds=300):
        assert [tuple(step) for step in known[2:]] == [(True, True)] * 2
