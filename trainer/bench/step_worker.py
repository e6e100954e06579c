"""One rank of the step benchmark: `step.py` starts it, never a person."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from trainer.bench.launch import ROOT
from trainer.bench.memory import peak_bytes
from trainer.bench.step import CHECKPOINTED, PLAIN, StepCase
from trainer.comm import Comm
from trainer.config import DataConfig, RunConfig
from trainer.data.tokenize import train_tokenizer
from trainer.engine.groups import parameter_groups
from trainer.engine.zero import Engine
from trainer.losses.contrastive import info_nce
from trainer.models.two_tower import TwoTowerConfig, build_two_tower
from trainer.recipe import load_recipe
from trainer.recipes import clip
from trainer.run import context_of
from trainer.running.steps import train_step
from trainer.types import Batch, Progress

ENDLESS = 10**9
"""Steps of the run that is imagined: the learning rate stays where it begins."""


class Side(NamedTuple):
    """One way to train."""

    step: Callable[[], float]
    """Take a step; the loss before it."""
    held: Callable[[], dict[str, int]]
    """Bytes on this rank between steps: weights, moments, kept_whole."""


class Lap(NamedTuple):
    """One step."""

    clock: float
    cpu: float
    loss: float


def measure(case: StepCase, comm: Comm) -> list[dict[str, Any]]:
    """A row for each side, the same on every rank; the sides take turns."""
    torch.set_num_threads(case.threads)
    sides = {name: _side(name, case, comm) for name in case.sides}
    for side in sides.values():
        for _ in range(case.warm_up):
            side.step()
    laps: dict[str, list[Lap]] = {name: [] for name in sides}
    for turn in range(case.rounds):
        # Whoever goes first in one round goes last in the next.
        for name in sorted(sides, reverse=bool(turn % 2)):
            laps[name].append(timed(sides[name], comm))
    return [_row(name, side, laps[name], case, comm) for name, side in sides.items()]


def timed(side: Side, comm: Comm) -> Lap:
    comm.barrier()
    _wait(comm)
    clock, cpu = time.perf_counter(), time.process_time()
    loss = side.step()
    _wait(comm)
    return Lap(time.perf_counter() - clock, time.process_time() - cpu, loss)


def _wait(comm: Comm) -> None:
    if comm.device.type == "cuda":
        torch.cuda.synchronize(comm.device)


def _row(name: str, side: Side, laps: list[Lap], case: StepCase, comm: Comm) -> dict[str, Any]:
    """Join what the ranks saw."""
    peak = peak_bytes(side.step, comm.device)
    seen = comm.gather_json([[list(lap) for lap in laps], side.held(), peak])
    clocks, cpus, losses = (
        [[lap[column] for lap in of_rank] for of_rank, *_ in seen] for column in range(3)
    )
    slowest = [max(ranks) for ranks in zip(*clocks, strict=True)]
    held = {key: max(bytes_of[key] for _, bytes_of, _ in seen) for key in seen[0][1]}
    return {
        "side": name,
        "ranks": comm.world_size,
        "preset": case.model.preset,
        "global_batch": case.global_batch,
        "text_length": case.model.text_length,
        "threads": case.threads,
        "device": comm.device.type,
        "loss": round(sum(of_rank[-1] for of_rank in losses) / comm.world_size, 6),
        "seconds": median(slowest),
        "fastest_seconds": min(slowest),
        "cpu_seconds": median(map(sum, zip(*cpus, strict=True))),
        **held,
        **_shares(held, case, comm),
        "peak": max(peak for *_, peak in seen),
        "peak_of": "CUDA allocator" if comm.device.type == "cuda" else "live tensors",
    }


def _shares(held: dict[str, int], case: StepCase, comm: Comm) -> dict[str, float]:
    whole = _trained_bytes(case) / comm.world_size
    return {
        "weights_over_share": round(held["weights"] / whole, 4),
        "moments_over_share": round(held["moments"] / (2 * whole), 4),
        "kept_whole_over_share": round(held["kept_whole"] / whole, 4),
    }


def _trained_bytes(case: StepCase) -> int:
    """Of the trained parameters in float32."""
    model = build_two_tower(case.model, any_tokenizer(case.model))
    return 4 * model.count_parameters()["trained"]


# -- the sides --------------------------------------------------------------------------------


def _side(name: str, case: StepCase, comm: Comm) -> Side:
    return _plain(case, comm) if name == PLAIN else _engine(name, case, comm)


def _plain(case: StepCase, comm: Comm) -> Side:
    """No framework: what the others are compared with."""
    optim = _run_config(case).optim
    model = build_two_tower(case.model, any_tokenizer(case.model)).to(comm.device)
    groups = parameter_groups(model.named_parameters(), optim, model.parameter_depth)
    fused = comm.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.epsilon, fused=fused)
    batch = noise(case, comm)

    def step() -> float:
        features = model(batch)
        loss = info_nce(features.image, features.text, features.logit_scale, comm)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def held() -> dict[str, int]:
        moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        return {
            "weights": sum(p.nbytes for p in model.parameters()),
            "moments": sum(moment.nbytes for moment in moments),
            "kept_whole": 0,
        }

    return Side(step, held)


def _engine(name: str, case: StepCase, comm: Comm) -> Side:
    """The program's own step, under the ZeRO stage that the name says."""
    config = _run_config(case)
    context = context_of(config, comm, any_tokenizer(case.model))
    recipe = load_recipe(config.recipe, context)
    recipe.model.gradient_checkpointing(name.endswith(CHECKPOINTED))
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            recipe.model,
            config.optim,
            comm,
            deepspeed_config=float32_file(name.removesuffix(CHECKPOINTED), Path(folder)),
            micro_batch=case.global_batch // comm.world_size,
        )
    batch, progress = noise(case, comm), Progress()

    def step() -> float:
        losses, applied = train_step(engine, recipe, [batch], progress, config)
        assert applied
        return losses.total.item()

    def held() -> dict[str, int]:
        return {**engine.bytes_per_rank(), "kept_whole": _kept_whole(engine)}

    return Side(step, held)


def _kept_whole(engine: Engine) -> int:
    """Bytes of gathered parameters that ZeRO-3 doesn't give back; 0 under the other stages."""
    return sum(p.data.nbytes for p in engine.module.parameters() if hasattr(p, "ds_tensor"))


def float32_file(stage: str, folder: Path) -> Path:
    """The project's DeepSpeed file, without bfloat16: the plain loop has none either."""
    values = json.loads((ROOT / "ds_configs" / f"{stage}.json").read_text())
    path = folder / f"{stage}.json"
    path.write_text(json.dumps({**values, "bf16": {"enabled": False}}))
    return path


# -- what all sides share -----------------------------------------------------------------------


def _run_config(case: StepCase) -> RunConfig:
    return RunConfig(
        workdir=Path(),
        steps=ENDLESS,
        global_batch=case.global_batch,
        recipe=clip.Config(model=case.model),
        data=DataConfig(train="unused.tar"),
    )


def any_tokenizer(model: TwoTowerConfig) -> PreTrainedTokenizerFast:
    """Of the model's vocabulary, which decides how large the text tower's table is."""
    assert model.vocabulary is not None
    tokenizer = train_tokenizer(["a"], vocab_size=259, length=model.text_length)
    tokenizer.add_tokens([f"word{n}" for n in range(model.vocabulary - len(tokenizer))])
    return tokenizer


def noise(case: StepCase, comm: Comm) -> Batch:
    """This rank's rows of the one global batch: noise, and texts that fill their length."""
    model, generator = case.model, torch.Generator().manual_seed(0)
    size = (case.global_batch, 3, model.image_size, model.image_size)
    images = torch.randn(size, generator=generator)
    shape = (case.global_batch, model.text_length)
    assert model.vocabulary is not None
    tokens = torch.randint(3, model.vocabulary, shape, generator=generator)
    tokens[:, -1] = 1
    rows = slice(*comm.row_range(case.global_batch))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    ids = torch.arange(case.global_batch)
    images, tokens, mask, ids = (x[rows].to(comm.device) for x in (images, tokens, mask, ids))
    return Batch(images, tokens, mask, ids)


def main() -> None:
    comm = Comm.from_environment()
    rows = measure(StepCase.model_validate_json(sys.argv[1]), comm)
    if comm.is_main:
        Path(sys.argv[2]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
