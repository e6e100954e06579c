"""A second copy on another disk is as whole as the first, and stands in for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.errors import CheckpointError, ConfigError


def copying(folder: Path, comm: Comm | None = None) -> Checkpointer:
    comm = comm or Comm.solo()
    return Checkpointer(folder / "first", comm, second=folder / "second")


def save(checkpoints: Checkpointer, step: int, rank: int = 0) -> Path:
    tensors = {"weights": {f"of rank {rank}": torch.full((64,), float(step))}}
    return checkpoints.save(step, tensors, {"progress": {"step": step}}, {"run.yaml": "a: 1\n"})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def saved_by_two(comm: Comm, folder: Path) -> list[float]:
    checkpoints = copying(folder, comm)
    for step in (2, 4, 6):
        save(checkpoints, step, comm.rank)
    comm.barrier()
    if comm.is_main:
        shutil.rmtree(folder / "first")
    comm.barrier()
    restored = copying(folder, comm).latest()
    assert restored is not None
    return [float(t.mean()) for _, t in restored.tensors("weights")]


def test_ranks_copy_their_files_and_all_read_them_where_the_first_folder_is_gone(tmp_path):
    assert run_ranks(saved_by_two, 2, tmp_path) == [[6.0, 6.0], [6.0, 6.0]]
    assert sorted(p.name for p in (tmp_path / "second").iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]


def test_both_folders_hold_the_same_bytes(tmp_path):
    for step in (2, 4, 6):
        save(copying(tmp_path), step)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


@pytest.mark.parametrize("of_first", [True, False])
def test_whichever_is_damaged_the_other_one_is_read_and_no_step_is_lost(tmp_path, of_first):
    for step in (2, 4):
        save(copying(tmp_path), step)
    newest = tmp_path / ("first" if of_first else "second") / "step-00000004"
    with (newest / "weights-00001-of-00001.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x55")
    said: list[str] = []
    restored = copying(tmp_path).latest(warn=said.append)
    assert restored is not None
    assert restored.step == 4
    assert restored.folder.parent.name == ("second" if of_first else "first")
    assert len(said) == of_first
    save(copying(tmp_path), 6)
    assert copying(tmp_path).latest().folder == tmp_path / "first/step-00000006"


def test_a_copy_that_can_not_be_written_is_told_and_the_first_is_there(tmp_path):
    (tmp_path / "second").write_text("no folder")
    with pytest.raises(CheckpointError, match="is saved, but its second copy is not"):
        save(copying(tmp_path), 2)
    shutil.copytree(tmp_path / "first", tmp_path / "kept")
    assert Checkpointer(tmp_path / "kept", Comm.solo()).latest().step == 2


def test_a_copy_of_bytes_that_changed_since_they_were_hashed_is_refused(tmp_path, monkeypatch):
    copied = shutil.copyfile

    def worn(source: Path, target: Path) -> None:
        copied(source, target)
        if "weights" in Path(target).name:
            Path(target).write_bytes(Path(target).read_bytes()[:-1] + b"\x55")

    monkeypatch.setattr(shutil, "copyfile", worn)
    with pytest.raises(CheckpointError, match="has SHA-256"):
        save(copying(tmp_path), 2)
    assert list((tmp_path / "second").iterdir()) == []


def test_a_copy_inside_the_workdir_is_refused(tmp_path):
    from tests.test_config import RUN
    from trainer.config import parse_run

    with pytest.raises(ConfigError, match="is inside the workdir"):
        parse_run(RUN, ["workdir=runs/x", "second_copy=runs/x/copy"])
