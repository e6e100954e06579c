"""Options that several benchmarks share."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import get_args

from trainer.bench.launch import ROOT
from trainer.models.config import Preset, TwoTowerConfig

SHARDS = str(ROOT / "data" / "open" / "train-{000000..000002}.tar")
"""The quickstart's drawings."""


def number_list(text: str) -> tuple[int, ...]:
    """Numbers of an option, as in 1,2,4."""
    return tuple(int(part) for part in text.split(","))


def add_model_options(command: ArgumentParser) -> None:
    command.add_argument("--preset", choices=get_args(Preset), default="tiny")
    command.add_argument("--text-length", type=int, default=16, help="tokens per caption")
    command.add_argument("--batch", type=int, default=64, help="samples over all ranks")
    command.add_argument("--threads", type=int, default=1, help="of each process")


def model_of(options: Namespace) -> TwoTowerConfig:
    return TwoTowerConfig(preset=options.preset, text_length=options.text_length)
