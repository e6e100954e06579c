"""Weights & Biases: offline by the package itself, and one sentence where it is not installed."""

from __future__ import annotations

import importlib
import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from trainer.comm import Comm
from trainer.config import Period
from trainer.errors import ConfigError
from trainer.log.metrics import MetricLog
from trainer.log.tracker import WeightsAndBiases
from trainer.types import Progress

_BLOCK, _FULL, _LAST = 32768, 1, 4
STEP = Period.model_construct(count=1.0, unit="steps")


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        WeightsAndBiases("protoscale", tmp_path, {})


@pytest.mark.filterwarnings("ignore")
def test_an_offline_run_holds_the_numbers_twice_after_a_resume_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own reader finds what was put; the steps are ours, so going back is no error."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    for start in (0, 1):  # goes on from step 1, so step 2 is sent twice
        tracker = WeightsAndBiases("protoscale", tmp_path, {"seed": 3})
        console = Console(file=io.StringIO())
        with MetricLog(
            *(tmp_path, Comm.solo()),
            total_steps=3,
            log_every=STEP,
            console=console,
            tracker=tracker,
        ) as log:
            log.resume(Progress(step=start, samples=8 * start))
            for step in range(start + 1, 3):
                log.put(Progress(step=step, samples=8 * step), {"loss": torch.tensor(1.0 / step)})
            log.event(Progress(step=2, samples=16), "names", top1=0.5)
            log.image(Progress(step=2, samples=16), "clusters", np.zeros((4, 4, 3), np.uint8))
    written = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(written) == 2
    assert len({path.name for path in written}) == 1, "one run, gone on with"
    steps = [float(row["step"]) for path in written for row in rows_of(path) if "train/loss" in row]
    assert steps == [1.0, 2.0, 2.0]
    assert not any(b"a" * 40 in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def rows_of(path: Path) -> list[dict[str, str]]:
    """The history of an offline file: records in a log of blocks, as LevelDB frames them."""
    records = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, place, whole = path.read_bytes(), 7, b""
    rows = []
    while place + 7 <= len(data):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind not in (_FULL, _LAST):
            continue
        record, whole = records.Record.FromString(whole), b""
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): item.value_json for item in items})
    return rows
