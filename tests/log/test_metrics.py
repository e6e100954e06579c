"""Metric files across kills and ranks, read back by their own readers; terminals, real and not."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pty
import re
import resource
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import Period
from trainer.errors import ConfigError
from trainer.log.metrics import EVENTS, METRICS, MetricLog
from trainer.log.records import JsonLines
from trainer.log.terminal import Speedometer, episode_line, event_line
from trainer.long_work import duration
from trainer.types import Progress

BATCH = 64


def every(count: float, unit: str) -> Period:
    return Period.model_construct(count=count, unit=unit)


def quiet() -> Console:
    return Console(file=io.StringIO())


def at(step: int) -> Progress:
    return Progress(step=step, samples=step * BATCH)


def values(step: int) -> dict[str, float | int | Tensor]:
    return {"loss": torch.tensor(1.0 / step), "step squared": step**2, "half": 0.5}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fixed(path: Path) -> list[dict[str, Any]]:
    """Without what depends on a clock."""
    return [{k: v for k, v in line.items() if k != "timing"} for line in lines(path)]


def train(workdir: Path, start: int, stop: int, *, saves: Iterable[int] = ()) -> None:
    """Steps (start, stop], ended as by a kill: nothing is flushed or closed.

    An evaluation has a count of samples of its own, which is not the cursor of the run.
    """
    log = MetricLog(
        workdir, Comm.solo(), total_steps=20, log_every=every(2, "steps"), console=quiet()
    )
    log.resume(at(start))
    for step in range(start + 1, stop + 1):
        if step in (1, 9, 15):
            log.event(at(step - 1), "episode", objective=1.0 / step)
        log.put(at(step), values(step))
        if step % 4 == 0:
            log.event(at(step), "evaluation", top1=step / 20, samples=3)
        if step in saves:
            log.flush()
    if stop == 20:
        log.close()


def scalars(workdir: Path, tag: str) -> dict[int, float]:
    accumulator = EventAccumulator(str(workdir / "tensorboard")).Reload()
    events = accumulator.Scalars(tag)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def test_kill_and_resume_leave_the_lines_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """Killed before the first checkpoint, then at 13 and at 9 after one at 8.

    Steps, evaluations and episodes (which may begin between a checkpoint and the next step) are
    neither missing nor doubled.
    """
    train(tmp_path / "whole", 0, 20, saves=[8])
    killed = tmp_path / "killed"
    train(killed, 0, 6)
    train(killed, 0, 13, saves=[8])
    with (killed / METRICS).open("a") as file:
        file.write('{"step": 14, "sam')
    train(killed, 8, 9)
    train(killed, 8, 20)
    for name in (METRICS, EVENTS):
        assert fixed(killed / name) == fixed(tmp_path / "whole" / name)
    assert [line["step"] for line in fixed(killed / METRICS)] == list(range(2, 21, 2))
    events = [(line["event"][:2], line["step"]) for line in fixed(killed / EVENTS)]
    assert events == [
        *[("ep", 0), ("ev", 4), ("ev", 8), ("ep", 8)],
        *[("ev", 12), ("ep", 14), ("ev", 16), ("ev", 20)],
    ]
    for tag in ("train/loss", "evaluation/top1", "episode/objective"):
        assert scalars(killed, tag) == scalars(tmp_path / "whole", tag)


def test_a_run_without_checkpoint_starts_its_files_anew(tmp_path: Path) -> None:
    train(tmp_path, 0, 7)
    train(tmp_path, 0, 20)
    assert [line["step"] for line in lines(tmp_path / METRICS)] == list(range(2, 21, 2))


def test_json_and_tensorboard_hold_the_same_numbers(tmp_path: Path) -> None:
    train(tmp_path, 0, 20)
    records = lines(tmp_path / METRICS)
    assert list(records[0]) == ["step", "samples", "skipped", "values", "timing"]
    assert records[3]["samples"] == 8 * BATCH
    for name in ("loss", "step squared", "half"):
        expected = {line["step"]: pytest.approx(line["values"][name]) for line in records}
        assert scalars(tmp_path, f"train/{name}") == expected
    assert records[-1]["values"] == {"loss": pytest.approx(0.05), "step squared": 400, "half": 0.5}
    assert records[-1]["timing"]["samples_per_second"] > 0


def test_a_line_is_written_one_step_late_and_by_flush(tmp_path: Path) -> None:
    """So that nobody waits for the device: the next call finds it long done."""
    path, value = tmp_path / METRICS, torch.zeros(())
    log = MetricLog(
        tmp_path, Comm.solo(), total_steps=9, log_every=every(1, "steps"), console=quiet()
    )
    for step in (1, 2, 3):
        log.put(at(step), {"loss": value + step})
        assert [line["step"] for line in lines(path)] == list(range(1, step))
    log.flush()
    assert [line["values"]["loss"] for line in lines(path)] == [1.0, 2.0, 3.0]
    log.close()
    assert len(lines(path)) == 3


def test_the_last_step_is_logged_whatever_the_period(tmp_path: Path) -> None:
    with MetricLog(
        tmp_path, Comm.solo(), total_steps=7, log_every=every(5, "steps"), console=quiet()
    ) as log:
        for step in range(1, 8):
            log.put(at(step), values(step))
    assert [line["step"] for line in lines(tmp_path / METRICS)] == [5, 7]


def test_what_is_not_a_number_is_null(tmp_path: Path) -> None:
    """Strict JSON, and TensorBoard still shows it as what it was."""
    numbers: Mapping[str, Any] = {"loss": torch.tensor(math.nan), "other": -math.inf}
    with MetricLog(
        tmp_path, Comm.solo(), total_steps=1, log_every=every(1, "steps"), console=quiet()
    ) as log:
        log.put(at(1), numbers)
        log.event(at(1), "episode", norm=math.inf, sizes=[1, math.nan], array=np.float32(0.5))
    assert lines(tmp_path / METRICS)[0]["values"] == {"loss": None, "other": None}
    record = lines(tmp_path / EVENTS)[0]
    assert (record["norm"], record["sizes"], record["array"]) == (None, [1, None], 0.5)
    assert math.isnan(scalars(tmp_path, "train/loss")[1])


def test_an_image_comes_back_from_tensorboard(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    with MetricLog(tmp_path, Comm.solo(), total_steps=1, console=quiet()) as log:
        log.image(at(1), "clusters/largest", pixels)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = accumulator.Images("pictures/clusters/largest")
    found = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert event.step == 1
    assert np.array_equal(found, pixels)


def test_headings_of_tensorboard_keep_evaluations_pictures_and_the_start_apart(
    tmp_path: Path,
) -> None:
    """An evaluation may be called as a picture is; what a run was started from is a page."""
    (tmp_path / "run.yaml").write_text("steps: 7\n")
    starts = [{"commit": "old"}, {"commit": "new"}]
    (tmp_path / "environment.json").write_text(json.dumps(starts))
    with MetricLog(tmp_path, Comm.solo(), total_steps=1, console=quiet()) as log:
        log.evaluation(at(1), "retrieval", {"top1": 50.0})
        log.image(at(1), "retrieval", np.zeros((4, 4, 3), np.uint8))
        log.event(at(1), "episode", episode=3, seconds=2.0)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"eval: retrieval/top1", "episode/seconds"}
    assert board.Tags()["images"] == ["pictures/retrieval"]
    pages = {tag: board.Tensors(tag)[0].tensor_proto for tag in board.Tags()["tensors"]}
    assert {tag.split("/text_summary")[0] for tag in pages} == {"run/configuration", "run/start"}
    texts = b" ".join(page.string_val[0] for page in pages.values()).decode()
    assert "steps: 7" in texts
    assert '"commit": "new"' in texts
    assert "old" not in texts


def test_resuming_after_the_first_number_is_a_mistake(tmp_path: Path) -> None:
    with MetricLog(tmp_path, Comm.solo(), total_steps=1, console=quiet()) as log:
        log.event(at(0), "start")
        with pytest.raises(RuntimeError, match="before the first"):
            log.resume(at(1))


def test_epochs_need_their_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 epochs"):
        MetricLog(tmp_path, Comm.solo(), total_steps=1, log_every=every(2, "epochs"))


# -- a disk that fails --------------------------------------------------------------------------


def test_lines_wait_while_the_disk_is_full(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is raised, nothing is lost, and one line says so."""
    path, (soft, hard) = tmp_path / "some.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    file = JsonLines(path, keep=lambda record: True)
    try:
        # The limit holds for the captured stderr too, and leaves room for the warning there.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        for number in range(300):
            file.append({"number": number})
        assert path.stat().st_size == 2000  # the last line is half there
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.append({"number": 300})
    file.close()
    assert [line["number"] for line in lines(path)] == list(range(301))
    assert capfd.readouterr().err.count("File too large") == 1


# -- ranks --------------------------------------------------------------------------------------


def log_on_ranks(comm: Comm, workdir: Path) -> str:
    """Rank r logs r + step and waits for data r tenths of the time."""
    console = Console(file=io.StringIO())
    with MetricLog(
        workdir, comm, total_steps=6, log_every=every(2 * BATCH, "samples"), console=console
    ) as log:
        for step in range(1, 7):
            log.put(at(step), {"loss": torch.tensor(float(comm.rank + step)), "rank": comm.rank})
            log.event(at(step), "tick", rank=comm.rank)
        log.say(f"the end, says rank {comm.rank}")
    minutes = MetricLog(
        workdir / "minutes", comm, total_steps=99, log_every=every(1e-9, "min"), console=console
    )
    for step in range(1, 6):
        minutes.put(at(step), {"loss": 1.0})
    minutes.close()
    text: str = console.file.getvalue()
    return text


def test_rank_zero_writes_the_mean_over_ranks(tmp_path: Path) -> None:
    shown = run_ranks(log_on_ranks, 3, tmp_path)
    assert [line["values"] for line in lines(tmp_path / METRICS)] == [
        {"loss": step + 1.0, "rank": 1.0} for step in (2, 4, 6)
    ]
    assert [line["rank"] for line in lines(tmp_path / EVENTS)] == [0] * 6
    assert [line["step"] for line in lines(tmp_path / "minutes" / METRICS)] == [2, 4]
    assert shown[0].count("the end, says rank 0") == 1
    assert shown[1:] == ["", ""]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


# -- what a person sees -------------------------------------------------------------------------

PLAIN = re.compile(
    r"step (\d+)/20  loss 0\.\d+  [\d.e+]+ samples/s  data wait \d+ %  ETA (\d+ \w+ ?)+"
)


def test_plain_lines_where_nobody_watches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Output goes into a file or a pipe: a line per interval and no control characters."""
    with MetricLog(tmp_path, Comm.solo(), total_steps=20, log_every=every(5, "steps")) as log:
        for step in range(1, 21):
            log.put(at(step), {"loss": 0.25 + 0.001 * step})
        log.event(at(20), "zero_shot/[emoji]", top1=0.4125, classes=205, confusion=[1, 2])
        log.say("done [in] no time")
    output = capsys.readouterr().out
    assert "\x1b" not in output
    shown = output.splitlines()
    matches = [PLAIN.fullmatch(line) for line in shown[:3]]
    assert [match[1] for match in matches if match] == ["5", "10", "15"]
    assert shown[3] == "step 20  zero_shot/[emoji]: top1 0.4125, classes 205"
    assert shown[4] == "done [in] no time"
    assert PLAIN.fullmatch(shown[5])


def read_all(descriptor: int, chunks: list[bytes]) -> None:
    """What a terminal gets, until the other end is closed (which Linux tells by EIO)."""
    with contextlib.suppress(OSError):
        while chunk := os.read(descriptor, 4096):
            chunks.append(chunk)
    os.close(descriptor)


def test_a_live_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real pseudo-terminal: the bar is drawn, lines pass above it, the cursor comes back."""
    master, slave = pty.openpty()
    chunks: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(master, chunks))
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(slave, "w") as terminal:
        log = MetricLog(tmp_path, Comm.solo(), total_steps=20, console=Console(file=terminal))
        for step in range(1, 21):
            log.put(at(step), {"loss": 0.25})
        log.event(at(20), "zero_shot/[emoji]", top1=0.4125)
        log.close()
    reader.join()
    shown = b"".join(chunks).decode()
    assert "\x1b[?25l" in shown  # cursor hidden
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # and shown again
    assert "step 20  zero_shot/[emoji]: top1 0.4125" in shown
    assert re.search(r"step 20/20  loss 0\.25  [\d.e+]+ samples/s  data wait 0 %  ETA 0 s", shown)


def test_speed_is_that_of_the_last_steps() -> None:
    """Ten slow steps, then fast ones: the slow ones leave the window."""
    meter, now, wait = Speedometer(at(100), 1000.0, window=5), 1000.0, 0.0
    for step in range(101, 121):
        seconds = 10.0 if step <= 110 else 0.5
        now, wait = now + seconds, wait + seconds / 4
        speed = meter.mark(at(step), now, wait_seconds=wait)
        if step in (101, 110):
            assert speed == pytest.approx((BATCH / 10.0, 0.25, 10.0))
    assert speed == pytest.approx((BATCH / 0.5, 0.25, 0.5))


def test_durations_and_events_in_words() -> None:
    pairs = [(0.4, "0 s"), (59.6, "1 min 0 s"), (130.0, "2 min 10 s"), (3599.7, "1 h 0 min")]
    pairs += [(11100.0, "3 h 5 min"), (187300.0, "2 d 4 h"), (math.nan, "unknown")]
    assert [duration(seconds) for seconds, _ in pairs] == [words for _, words in pairs]
    assert event_line(at(3), "saved", {}) == "step 3  saved"
    many = event_line(at(3), "episode", {f"figure_{n}": n for n in range(14)})
    assert many.endswith("figure_9 9, and 4 more in events.jsonl")
    figures = {"top1": 41.5, "top5": 67.25, "chance": 0.4878, "chance_top5": 2.44, "samples": 205}
    assert event_line(at(9), "birds", figures) == (
        "step 9  birds: top1 41.5 (chance 0.4878), top5 67.25 (chance 2.44), samples 205"
    )
    assert event_line(at(9), "alone", {"chance": 0.5}) == "step 9  alone: chance 0.5"
    words = episode_line(
        at(6),
        {
            "episode": 3,
            "seconds_extract": 5.0,
            "seconds_cluster": 7.4,
            "nmi_image_text": 0.413,
            "image_objective": 0.51,
            "text_repaired": 2.0,
        },
    )
    assert words == (
        "step 6  episode 3: clustered in 12 s; image and text clusters agree by 0.41 (NMI); "
        "mean squared distance to the own cluster 0.51 (image)"
    )
    assert episode_line(at(0), {"episode": 0}) == "step 0  episode 0: no prototypes"
