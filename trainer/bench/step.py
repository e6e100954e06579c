"""A training step under ZeRO beside the plainest correct PyTorch loop: time, shares, peak memory.

`plain` is the loop that one would write without a framework: model, InfoNCE, `backward`,
`clip_grad_norm_`, torch's AdamW. The others are `train_step` of the program itself. All begin
with the same weights and repeat the same global batch, so their losses must agree; all compute
in float32. `plain` and `zero0` take turns, step by step, in one process.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from trainer.bench.launch import launch
from trainer.bench.options import add_model_options, model_of, number_list
from trainer.config import Frozen, PositiveInt
from trainer.errors import ConfigError
from trainer.models.two_tower import TwoTowerConfig

PLAIN = "plain"
CHECKPOINTED = "+checkpointing"
"""End of the name of a side that recomputes activations backward."""


class StepCase(Frozen):
    """What is measured; `sides` are `plain` or a file of ds_configs/, perhaps `+checkpointing`."""

    model: TwoTowerConfig = TwoTowerConfig(preset="tiny", text_length=16)
    global_batch: PositiveInt = 64
    rounds: PositiveInt = 9
    """Timed steps of each side."""
    warm_up: PositiveInt = 2
    """Steps of each side before them."""
    threads: PositiveInt = 1
    """Of each process."""
    sides: tuple[str, ...] = (PLAIN, "zero0")


def add_options(command: ArgumentParser) -> None:
    add_model_options(command)
    command.add_argument("--rounds", type=int, default=9, help="timed steps of each side")
    command.add_argument("--ranks", type=number_list, default=(1, 2), help="of ZeRO-3, as in 1,2,4")


def measure_options(options: Namespace) -> list[dict[str, Any]]:
    case = StepCase(
        model=model_of(options),
        global_batch=options.batch,
        rounds=options.rounds,
        threads=options.threads,
    )
    return run(case, ranks=options.ranks)


def run(case: StepCase, *, ranks: Sequence[int] = (1, 2)) -> list[dict[str, Any]]:
    """One row per side, and for ZeRO-3 per number of ranks.

    seconds, fastest_seconds: median and least of the slowest rank's time for a step;
    cpu_seconds: median of all ranks' CPU time together, what to compare on a busy machine;
    *ratio_to_plain: that over the plain loop's; loss: before the last step;
    weights, moments: bytes on the rank that holds most; kept_whole: bytes of small parameters
    that ZeRO-3 keeps whole besides; *_over_share: these over 1/W of all moments or weights;
    peak: bytes that a step holds above what is held between steps, on the rank that holds most;
    peak_of: how that was counted.
    """
    for world_size in ranks:
        if case.global_batch % world_size:
            raise ConfigError(f"batch {case.global_batch} is not divisible by {world_size} ranks")
    rows = _measured(case, (PLAIN, "zero0"), 1)
    for world_size in ranks:
        rows += _measured(case, ("zero3", "zero3" + CHECKPOINTED), world_size)
    plain = rows[0]
    return [_compared(row, plain) for row in rows]


def _measured(case: StepCase, sides: tuple[str, ...], world_size: int) -> list[dict[str, Any]]:
    text = case.model_copy(update={"sides": sides}).model_dump_json()
    module = "trainer.bench.step_worker"
    return launch(module, text, ranks=world_size, threads=case.threads)


def _compared(row: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    times = ("seconds", "fastest_seconds", "cpu_seconds")
    ratios = {
        f"{name.removesuffix('seconds')}ratio_to_plain": round(row[name] / plain[name], 3)
        for name in times
    }
    return {"bench": "step", **row, **ratios}
