"""A step of CLIP beside steps that read a part of the patches, or several views: time and products.

All sides train the same towers on the same noise in one process at ZeRO-0 in float32, and take
turns. `clip` reads one view whole; `clip, random` a draw of its patches; `aclip` two views by
attention, with SimCLR and BYOL; `aclip, half` scores a look of half the pixels a side; `two views`
is what A-CLIP would cost without leaving anything out, and `slip` CLIP and SimCLR on two whole
views and no copy (SLIP itself has a third).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from trainer.bench.launch import launch
from trainer.bench.options import add_model_options, model_of
from trainer.config import Frozen, PositiveInt
from trainer.models.two_tower import TwoTowerConfig

CLIP = "clip"


class TokensCase(Frozen):
    """What is measured."""

    model: TwoTowerConfig
    global_batch: PositiveInt = 32
    rounds: PositiveInt = 5
    """Timed steps of each side."""
    keep: float = 0.5
    head_hidden: PositiveInt = 4096
    """Of SimCLR's and BYOL's heads."""
    threads: PositiveInt = 1

    def recipes(self) -> dict[str, dict[str, Any]]:
        """The sides, as sections of a run."""
        head = {"hidden": self.head_hidden}
        simclr, byol = {"head": {**head, "layers": 2}}, {"head": head}
        aclip = {"name": "aclip", "simclr": simclr, "byol": byol}
        tokens = {"keep": self.keep}
        none = {"select": "none"}
        return {
            CLIP: {"name": "clip"},
            "clip, random": {"name": "clip", "tokens": {**tokens, "select": "random"}},
            "aclip": {**aclip, "tokens": tokens},
            "aclip, half": {**aclip, "tokens": {**tokens, "cover_scale": 0.5}},
            "slip": {**aclip, "byol": None, "tokens": none},
            "two views": {**aclip, "tokens": none},
        }


def add_options(command: ArgumentParser) -> None:
    add_model_options(command)
    command.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    command.add_argument("--keep", type=float, default=0.5, help="share of the patches")
    command.add_argument("--patch", type=int, help="pixels a side of one, if not the preset's")
    command.add_argument("--hidden", type=int, default=4096, help="width of the heads' MLPs")


def measure_options(options: Namespace) -> list[dict[str, Any]]:
    model = model_of(options).model_dump(exclude={"head"})
    case = TokensCase(
        model=TwoTowerConfig(**{**model, "patch_size": options.patch or model["patch_size"]}),
        global_batch=options.batch,
        rounds=options.rounds,
        keep=options.keep,
        head_hidden=options.hidden,
        threads=options.threads,
    )
    return run(case)


def run(case: TokensCase) -> list[dict[str, Any]]:
    """One row a side.

    seconds: median of a step; cpu_seconds: of its CPU time; products: multiplications and additions
    of matrices and convolutions, attention's too; *_to_clip: over those of `clip`.
    """
    rows = launch(
        "trainer.bench.tokens_worker", case.model_dump_json(), ranks=1, threads=case.threads
    )
    first = next(row for row in rows if row["side"] == CLIP)
    names = ("seconds", "cpu_seconds", "products")
    return [
        {"bench": "tokens", **row, **{f"{n}_to_clip": round(row[n] / first[n], 3) for n in names}}
        for row in rows
    ]
