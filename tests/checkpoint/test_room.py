"""Whether a checkpoint can be written is known before the first step, on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from trainer.checkpoint.room import bytes_needed, check_room, free_bytes
from trainer.comm import Comm
from trainer.errors import TrainerError


def test_a_folder_with_room_is_left_as_it_was(tmp_path: Path) -> None:
    check_room(tmp_path / "run" / "checkpoints", Comm.solo(), needed=1 << 20)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_too_little_room_is_told_with_both_sizes(tmp_path: Path) -> None:
    needed = free_bytes(tmp_path) + (1 << 40)
    with pytest.raises(TrainerError, match=r"needs about .* GiB and .* GiB are free in .*; make"):
        check_room(tmp_path, Comm.solo(), needed=needed)
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_no_file_can_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainerError, match=r"can't save into .*: Not a directory; make room"):
        check_room(tmp_path / "file" / "checkpoints", Comm.solo(), needed=1)


def test_a_first_checkpoint_holds_weights_and_two_moments_in_float32() -> None:
    assert bytes_needed(None, trained_parameters=10) == 10 * 3 * 4


def two_disks(comm: Comm, folder: Path) -> str:
    try:
        check_room(folder / f"host-{comm.rank}", comm, needed=1)
    except TrainerError as error:
        return str(error)
    return "fine"


def test_ranks_that_do_not_share_the_disk_are_told(tmp_path: Path) -> None:
    first, second = run_ranks(two_disks, 2, tmp_path)
    assert first == second
    assert first.startswith("rank 1: ")
    assert "must be on a disk that all ranks see" in first
