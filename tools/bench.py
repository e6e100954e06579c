"""Measure speed and memory as ratios: python tools/bench.py step, data, episode, kmeans, ...

Every subcommand prints a table and takes `--json FILE`. What to look at on a machine that is busy
with other things is CPU time; what to believe is a ratio, never the seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.bench.table import format_rows
from trainer.command import run_command
from trainer.models.config import Preset

Rows = list[dict[str, Any]]
SHARDS = str(Path(__file__).parents[1] / "data" / "open" / "train-{000000..000002}.tar")


def main() -> None:
    arguments = _parser().parse_args()
    rows = arguments.measure(arguments)
    print(format_rows(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure_step(arguments: argparse.Namespace) -> Rows:
    from trainer.bench.step import StepCase, run
    from trainer.models.config import TwoTowerConfig

    case = StepCase(
        model=TwoTowerConfig(preset=arguments.preset, text_length=arguments.text_length),
        global_batch=arguments.batch,
        rounds=arguments.rounds,
        threads=arguments.threads,
    )
    return run(case, ranks=arguments.ranks)


def measure_data(arguments: argparse.Namespace) -> Rows:
    from trainer.bench.data import run

    return run(arguments.data, seconds=arguments.seconds, size=arguments.size)


def measure_episode(arguments: argparse.Namespace) -> Rows:
    import torch

    from trainer.bench.episode import EpisodeCase, run
    from trainer.models.config import TwoTowerConfig

    torch.set_num_threads(arguments.threads)
    case = EpisodeCase(
        model=TwoTowerConfig(preset=arguments.preset, text_length=arguments.text_length),
        global_batch=arguments.batch,
        timed_steps=arguments.steps,
        rounds=arguments.rounds,
    )
    return run(arguments.data, samples=arguments.samples, clusters=arguments.clusters, case=case)


def measure_kmeans(arguments: argparse.Namespace) -> Rows:
    if arguments.million is not None:
        from trainer.bench import million

        case = million.Million(
            points=4 * arguments.clusters,
            clusters=arguments.clusters,
            components=max(arguments.clusters // 2, 1),
            start=arguments.start,
            threads=arguments.threads,
        )
        return million.run(arguments.million, case)
    from trainer.bench.kmeans import QUICK, SIZES, run

    sizes = SIZES if arguments.full else QUICK
    return run(sizes, threads=arguments.threads, rounds=arguments.rounds)


def measure_logits(arguments: argparse.Namespace) -> Rows:
    from trainer.bench.prototype_logits import plot, run, sweep

    shapes = (arguments.batch, arguments.prototypes, arguments.dim)
    rows: Rows = []
    for threads in arguments.threads:
        how = {"threads": threads, "rounds": arguments.rounds, "sides": arguments.sides}
        rows += run(sweep(*shapes, **how, most_logit_bytes=arguments.most_logits << 20))
    if arguments.plot:
        plot(rows, arguments.plot)
    return rows


def measure_head(arguments: argparse.Namespace) -> Rows:
    from trainer.bench.head_step import HeadCase, run

    case = HeadCase(
        prototypes=arguments.prototypes,
        dim=arguments.dim,
        batch=arguments.batch,
        sample_rate=arguments.rate,
        rounds=arguments.rounds,
    )
    return run(case, ranks=arguments.ranks)


def measure_embed(arguments: argparse.Namespace) -> Rows:
    import torch

    from trainer.bench.embed import run
    from trainer.data.teachers.spec import read_spec

    torch.set_num_threads(arguments.threads)
    return run(
        arguments.data,
        read_spec(arguments.teacher, arguments.settings),
        texts=arguments.texts,
        batch=arguments.batch,
        rounds=arguments.rounds,
        device="cuda" if torch.cuda.is_available() else "cpu",
        cache=arguments.cache,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="BENCH")
    _add_training(commands)
    _add_heads(commands)
    _add_embed(commands)
    return parser


def _add_heads(commands: Any) -> None:
    text = "cross-entropy against many rows beside torch, torch.compile, cut-cross-entropy"
    logits = _command(commands, "prototype-logits", text, measure_logits)
    logits.add_argument("--batch", type=_numbers, default=(1024,), help="sizes, as in 256,1024")
    logits.add_argument("--prototypes", type=_numbers, default=(100_000,), help="sizes")
    logits.add_argument("--dim", type=_numbers, default=(256,), help="sizes")
    logits.add_argument("--threads", type=_numbers, default=(1, 2), help="as in 1,2")
    logits.add_argument("--rounds", type=int, default=3, help="timed calls of each side")
    sides = ("ours", "naive", "compile", "cce")
    logits.add_argument("--sides", nargs="+", choices=sides, default=sides)
    help = "MiB of logits beyond which only ours runs"
    logits.add_argument("--most-logits", type=int, default=1024, help=help)
    logits.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory into it")

    text = "a whole MLCD step: rows that learn when touched beside an optimizer of all rows"
    head = _command(commands, "head-step", text, measure_head)
    head.add_argument("--prototypes", type=int, default=100_000)
    head.add_argument("--dim", type=int, default=128)
    head.add_argument("--batch", type=int, default=256, help="samples over all ranks")
    head.add_argument("--rate", type=float, default=0.1, help="share of the rows in a step")
    head.add_argument("--ranks", type=_numbers, default=(1, 2, 4), help="as in 1,2,4")
    head.add_argument("--rounds", type=int, default=5, help="timed steps of each")


def _add_training(commands: Any) -> None:

    step = _command(commands, "step", "a training step beside a plain PyTorch loop", measure_step)
    _model_options(step)
    step.add_argument("--rounds", type=int, default=9, help="timed steps of each side")
    step.add_argument("--ranks", type=_numbers, default=(1, 2), help="of ZeRO-3, as in 1,2,4")

    data = _command(commands, "data", "the reader beside webdataset's own loader", measure_data)
    data.add_argument("--data", default=SHARDS, help="shards")
    data.add_argument("--seconds", type=float, default=40.0, help="of measuring, both sides")
    data.add_argument("--size", type=int, default=64, help="pixels per side")

    episode = _command(commands, "episode", "phases of a ProtoCLIP episode", measure_episode)
    _model_options(episode)
    episode.add_argument("--data", default=SHARDS, help="shards")
    episode.add_argument("--samples", type=_numbers, default=(512, 1024, 2048), help="sizes")
    episode.add_argument("--clusters", type=_numbers, default=(64, 128, 256), help="K")
    episode.add_argument("--steps", type=int, default=5, help="timed steps of each episode")
    episode.add_argument("--rounds", type=int, default=2, help="episodes of each size")

    kmeans = _command(commands, "kmeans", "k-means beside faiss and sklearn", measure_kmeans)
    kmeans.add_argument("--full", action="store_true", help="the large sizes: many minutes")
    kmeans.add_argument("--rounds", type=int, default=2, help="runs of each side; the best counts")
    kmeans.add_argument("--threads", type=int, default=1)
    kmeans.add_argument("--million", type=Path, metavar="FOLDER", help="out of core, made there")
    kmeans.add_argument("--clusters", type=int, default=1_000_000, help="of --million")
    kmeans.add_argument(
        "--init", dest="start", choices=["sampled", "hierarchical"], default="sampled"
    )


def _add_embed(commands: Any) -> None:
    embed = _command(commands, "embed", "a teacher beside a plain transformers loop", measure_embed)
    embed.add_argument("settings", nargs="*", metavar="key=value", help="changes of the teacher")
    embed.add_argument("--teacher", default="minilm", help="pinned name, folder or YAML")
    embed.add_argument("--data", default=SHARDS, help="shards")
    embed.add_argument("--texts", type=int, default=512, help="the first of the shards")
    embed.add_argument("--batch", type=int, default=32, help="texts of a batch of the plain loop")
    embed.add_argument("--rounds", type=int, default=3, help="timed runs of each side")
    embed.add_argument("--threads", type=int, default=1)
    embed.add_argument("--cache", type=Path, default=Path("cache"))


def _command(
    commands: Any, name: str, text: str, measure: Callable[[argparse.Namespace], Rows]
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    command.set_defaults(measure=measure)
    return command


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--preset", choices=get_args(Preset), default="tiny")
    command.add_argument("--text-length", type=int, default=16, help="tokens per caption")
    command.add_argument("--batch", type=int, default=64, help="samples over all ranks")
    command.add_argument("--threads", type=int, default=1, help="of each process")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    run_command(main)
