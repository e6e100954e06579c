"""No small file of a run ends it: what can't be written waits, in order, until there is room."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.data.ledger import Ledger, Rejected
from trainer.data.waiting_file import WaitingFile
from trainer.log.records import JsonLines, TensorBoard


@contextmanager
def no_file_grows_beyond(size: int) -> Iterator[None]:
    """Nearer to a full disk than this no test comes without a disk of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """A folder that can't be made before `now_there`: a file stands in its place."""
    folder = tmp_path / "workdir"
    folder.write_text("")
    return folder


def now_there(folder: Path) -> None:
    folder.unlink()
    folder.mkdir()


def rejected(number: int) -> Rejected:
    return Rejected("a.tar", str(number), "no image", 0, number)


def test_the_ledger_waits_and_then_has_every_line(later: Path) -> None:
    ledger = Ledger(later, rank=3, budget=0.5)
    for number in range(5):
        ledger.put(num_read=1, rejected=[rejected(number)])
    now_there(later)
    ledger.put(num_read=1, rejected=[rejected(5)])
    ledger.close()
    lines = (later / "ledger" / "rank-3.jsonl").read_text().splitlines()
    assert [json.loads(line)["position"] for line in lines] == list(range(6))


def test_a_ledger_goes_on_behind_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger" / "rank-0.jsonl"
    path.parent.mkdir()
    path.write_text('{"position": 0}\n{"posi')
    ledger = Ledger(tmp_path, rank=0, budget=0.5)
    ledger.put(num_read=1, rejected=[rejected(1)])
    ledger.close()
    found = [json.loads(line)["position"] for line in path.read_text().splitlines()]
    assert found == [0, 1]


def test_lines_and_tensorboard_wait_for_their_folder(
    later: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = JsonLines(later / "some.jsonl", keep=lambda record: True)
    board = TensorBoard(later / "board", first_step=1)
    for step in range(1, 5):
        lines.append({"step": step})
        board.scalars(step, {"loss": 1.0 / step})
    now_there(later)
    lines.append({"step": 5})
    lines.close()
    board.close()
    text = (later / "some.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in text] == [1, 2, 3, 4, 5]
    events = EventAccumulator(str(later / "board")).Reload().Scalars("loss")
    assert {event.step: event.value for event in events} == {
        step: pytest.approx(1.0 / step) for step in range(1, 5)
    }
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2, said


def test_tensorboard_comes_back_from_the_middle_of_a_record(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, first_step=1)
    with no_file_grows_beyond(1000):
        for step in range(1, 60):
            board.scalars(step, {"loss": float(step)})
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size == 1000
    board.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload().Scalars("loss")
    assert [event.value for event in events] == [float(step) for step in range(1, 60)]


def test_lines_are_cut_without_room_for_a_copy(tmp_path: Path) -> None:
    """As after a kill on a full disk: the lines to go stand at the end."""
    path = tmp_path / "some.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(100)) + '{"ste')
    with no_file_grows_beyond(10):
        JsonLines(path, keep=lambda record: record["step"] < 60).close()
    text = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in text] == list(range(60))


def test_what_never_fits_is_counted_at_the_end(
    later: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = WaitingFile(later / "x")
    file.append(b"12345")
    file.close()
    assert "5 bytes of" in capfd.readouterr().err
