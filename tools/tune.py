"""Tune classifiers on stored features: linear probes, an MLP, NMTune.

  python tools/tune.py --model runs/quickstart --target subgroup --out runs/tune \
    --train 'data/open/train-{000000..000002}.tar' \
    --test held-out=data/open/val-000000.tar \
    --test 'unseen-vendor=data/open/test-unseen-vendor-{000000..000001}.tar'

The features are computed once, into OUT/features, and read from there: no encoder runs in training.
Without --model they are taken from --features FOLDER, a store FOLDER/train and one for each test.
Any launcher spreads the work: torchrun --nproc-per-node 4 tools/tune.py ...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers.utils.logging import disable_progress_bar

from trainer.comm import Comm
from trainer.command import parser_of, run_command, said_once
from trainer.errors import ConfigError
from trainer.programs.tune import METHODS, TRAIN, compare_methods, embed_sets, open_sets
from trainer.teachers.spec import read_spec


def main() -> None:
    arguments = _parser().parse_args()
    disable_progress_bar()
    comm = Comm.from_environment()
    shards = {TRAIN: arguments.train, **_tests(arguments.test)}
    if (arguments.model is None) == (arguments.features is None):
        raise ConfigError("give --model, whose features are computed, or --features FOLDER")
    if arguments.seeds < 1 or arguments.views < 0:
        raise ConfigError("give --seeds of at least 1 and --views of at least 0")
    folder = arguments.features or arguments.out / "features"
    say = said_once(comm)
    if arguments.model is not None:
        spec = read_spec(arguments.model, ["kind=image", *arguments.settings])
        embed_sets(spec, shards, folder, comm, views=arguments.views, say=say)
    sets = open_sets(shards, folder, arguments.target, comm)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    say(compare_methods(sets, arguments.methods, seeds, arguments.out, comm, say=say))
    say(f"results.json, table.md and tune.png are in {arguments.out}")


def _tests(given: list[str]) -> dict[str, str]:
    """Shards by name."""
    tests: dict[str, str] = {}
    for entry in given:
        name, equals, spec = entry.partition("=")
        if not (name and equals and spec) or "/" in name:
            raise ConfigError(f"--test {entry!r} is not NAME=SHARDS")
        if name == TRAIN or name in tests:
            raise ConfigError(f"--test {name}=... : the name is taken; choose another one")
        tests[name] = spec
    return tests


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, is_launched=True)
    parser.add_argument("--train", required=True, metavar="SHARDS", help="to fit on")
    parser.add_argument("--test", action="append", required=True, metavar="NAME=SHARDS")
    parser.add_argument("--target", required=True, metavar="KEY", help="json key of the class")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model", help="workdir of a run, or what tools/embed.py takes")
    parser.add_argument("--features", type=Path, metavar="FOLDER", help="stores that are there")
    parser.add_argument("--views", type=int, default=4, help="random views of a training image")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE", help="of --model")
    return parser


if __name__ == "__main__":
    run_command(main)
