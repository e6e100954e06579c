"""The process of the tokens benchmark: `tokens.py` starts it, never a person."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.bench.step import StepCase
from trainer.bench.step_worker import (
    ENDLESS,
    Lap,
    Side,
    any_tokenizer,
    float32_file,
    noise,
    timed,
)
from trainer.bench.tokens import TokensCase
from trainer.comm import Comm
from trainer.config import DataConfig, RunConfig, ViewsConfig
from trainer.data.crops import cover_size
from trainer.engine.zero import Engine
from trainer.recipe import attach_parts, load_recipe
from trainer.run import context_of
from trainer.running.steps import train_step
from trainer.settings.recipe_files import recipe_config
from trainer.types import Batch, Progress


def measure(case: TokensCase, comm: Comm) -> list[dict[str, Any]]:
    torch.set_num_threads(case.threads)
    sides = {name: _side(recipe, case, comm) for name, recipe in case.recipes().items()}
    products = {name: _products(side) for name, side in sides.items()}
    laps: dict[str, list[Lap]] = {name: [] for name in sides}
    for turn in range(case.rounds):
        for name in sorted(sides, reverse=bool(turn % 2)):
            laps[name].append(timed(sides[name], comm))
    return [
        {
            "side": name,
            "preset": case.model.preset,
            "global_batch": case.global_batch,
            "keep": case.keep,
            "threads": case.threads,
            "device": comm.device.type,
            "seconds": median(lap.clock for lap in laps[name]),
            "cpu_seconds": median(lap.cpu for lap in laps[name]),
            "products": products[name],
        }
        for name in sides
    ]


def _side(recipe: dict[str, Any], case: TokensCase, comm: Comm) -> Side:
    config = RunConfig(
        workdir=Path(),
        steps=ENDLESS,
        global_batch=case.global_batch,
        recipe=recipe_config({**recipe, "model": case.model}),
        data=DataConfig(train="unused.tar"),
    )
    built = load_recipe(config.recipe, context_of(config, comm, any_tokenizer(case.model)))
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            built.model,
            config.optim,
            comm,
            deepspeed_config=float32_file("zero0", Path(folder)),
            micro_batch=case.global_batch,
        )
    attach_parts(built, engine)
    batch, progress = _views(case, config.recipe.wanted_views(), comm), Progress()

    def step() -> float:
        losses, applied = train_step(engine, built, [batch], progress, config)
        assert applied
        return losses.total.item()

    return Side(step, engine.bytes_per_rank)


def _views(case: TokensCase, views: ViewsConfig, comm: Comm) -> Batch:
    """One view's noise, and as much more as is wanted; every view fills its cover."""
    batch = noise(StepCase(model=case.model, global_batch=case.global_batch), comm)
    assert batch.images is not None
    count, side = case.global_batch, case.model.image_size
    further, cover = views.count - 1, cover_size(side, views)
    covering = views.geometry == "covering"
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=comm.device)
    return batch._replace(
        epoch=torch.zeros_like(batch.sample_id),
        views=batch.images.new_empty(count, further, 3, side, side).normal_() if further else None,
        cover=batch.images.new_empty(count, 3, cover, cover).normal_() if covering else None,
        boxes=whole.expand(count, views.count, 4) if covering else None,
    )


def _products(side: Side) -> int:
    """Counted in a step that warms up; fused attention would count as nothing on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        side.step()
    return int(counter.get_total_flops())


def main() -> None:
    comm = Comm.from_environment()
    Path(sys.argv[2]).write_text(
        json.dumps(measure(TokensCase.model_validate_json(sys.argv[1]), comm))
    )


if __name__ == "__main__":
    main()
