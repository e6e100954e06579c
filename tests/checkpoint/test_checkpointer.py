"""Checkpoints under kills, bit flips, full disks and other world sizes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint import cases as cases
from tests.checkpoint.cases import save, solo, wrongs
from tests.ranks import run_ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.manifest import MANIFEST, SUM
from trainer.comm import Comm
from trainer.errors import CheckpointError

COMM = Comm.solo()


def launched(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a fresh process that may fork, kill and be slow to die."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=cases.in_launcher, args=(there, function, *arguments))
    process.start()
    there.close()
    try:
        done, result = here.recv()
    finally:
        process.join(timeout=10)
        process.kill()
    assert done, result
    return result


def saved(folder: Path, *steps: int, keep: int = 2) -> Checkpointer:
    checkpoints = solo(folder, keep=keep)
    for step in steps:
        save(checkpoints, COMM, step)
    return checkpoints


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# -- kills --------------------------------------------------------------------------------------


def test_killed_before_any_file_operation_of_saving(tmp_path: Path) -> None:
    """Two are sound at every moment: the oldest goes only after the newest is there."""
    result = launched(cases.kill_before_every_operation, tmp_path)
    assert result["status"] == 0
    before = result["outcomes"].count([2, 1])
    between = result["outcomes"].count([3, 2, 1])
    after = result["outcomes"].count([3, 2])
    assert before > 7
    assert between > 2
    assert after > 5
    assert before + between + after == len(result["outcomes"])


@pytest.mark.parametrize("beside", [False, True])
def test_a_rank_killed_at_random_moments(tmp_path: Path, beside: bool) -> None:
    """Whether training waits for the disk or not."""
    kills = 50 if beside else 100
    result = launched(cases.kill_at_random, tmp_path / "checkpoints", kills, 0, beside)
    assert result["torn"] >= kills // 4
    assert result["steps"] >= kills // 2


def test_a_save_beside_training_copies_first_and_the_next_waits_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for found in run_ranks(cases.saves_beside, 2, folder):
        assert not found["waited for the disk"]
        assert found["before the second"] == ["step-00000001"]
        assert found["values"] == [2, [2.0] * 3]
        assert found["emptied"]
        assert "can't save step 3: rank 1: File too large" in found["told"]
        assert "can't save step 4" in found.get("at the end", "can't save step 4")
        assert "step-00000002" in found["left"]
        assert "step-00000003" not in found["left"]


# -- damage -------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_every_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    draw, newest = random.Random(0), tmp_path / "step-00000002"
    files = listing(newest)
    assert {MANIFEST, SUM, "state.json", "run.yaml"} < set(files)
    for number in range(200):
        path = newest / files[number % len(files)]
        original = path.read_bytes()
        bit = draw.randrange(8 * len(original))
        flipped = bytearray(original)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        warnings: list[str] = []
        restored = solo(tmp_path).latest(warn=warnings.append)
        assert restored is not None
        assert restored.step == 1
        assert not wrongs(restored)
        assert len(warnings) == 1
        assert path.name in warnings[0]
        if path.suffix == ".safetensors":
            assert warnings[0].endswith(f" (in {part_at(original, bit // 8)})")
        path.write_bytes(original)
    assert cases.latest_step(tmp_path) == 2


def part_at(data: bytes, place: int) -> str:
    """What byte `place` of a safetensors file belongs to, from the file's own header."""
    first = 8 + int.from_bytes(data[:8], "little")
    for name, tensor in json.loads(data[8:first]).items():
        begin, end = tensor.get("data_offsets", (0, 0))
        if first + begin <= place < first + end:
            return str(name)
    return "its header; every tensor is as it was"


def test_a_checkpoint_without_sums_of_tensors_is_read_and_refused_by_file(tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    saved(tmp_path, 1)
    folder = tmp_path / "step-00000001"
    values = json.loads((folder / MANIFEST).read_bytes())
    for entry in values["files"]:
        for tensor in entry["tensors"].values():
            del tensor["begin"], tensor["end"], tensor["crc32"]
    sign(folder, json.dumps(values).encode())
    assert cases.latest_step(tmp_path) == 1
    path = folder / "weights-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=rf"{path.name} has SHA-256 \w+\.\.\. [^(]*; restore"):
        solo(tmp_path).latest(warn=lambda line: None)


@pytest.mark.parametrize(
    "name", [MANIFEST, SUM, "state.json", "weights-00001-of-00001.safetensors"]
)
def test_a_missing_or_short_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    saved(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / name
    for data in (path.read_bytes()[:-1], path.read_bytes() + b" ", b"", None):
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        warnings: list[str] = []
        restored = solo(tmp_path).latest(warn=warnings.append)
        assert restored is not None
        assert restored.step == 1
        assert name in warnings[0]


def test_when_none_is_usable_every_reason_is_given(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000001" / "run.yaml").unlink()
    (tmp_path / "step-00000002" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        solo(tmp_path).latest(warn=lambda line: None)
    message = str(caught.value)
    assert "step-00000001: run.yaml" in message
    assert "step-00000002: state.json has 2 bytes" in message


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert solo(tmp_path / "checkpoints").latest() is None


def test_a_refused_checkpoint_counts_for_nothing(tmp_path: Path) -> None:
    """It neither pushes a sound one out nor stands in the way of a new one of its step."""
    saved(tmp_path, 10, 20, 30)
    (tmp_path / "step-00000030" / "state.json").write_text("{}")
    checkpoints = solo(tmp_path)
    restored = checkpoints.latest(warn=lambda line: None)
    assert restored is not None
    assert restored.step == 20
    assert save(checkpoints, COMM, 25).name == "step-00000025"
    assert listing(tmp_path) == ["step-00000020", "step-00000025"]
    (tmp_path / "step-00000025" / "state.json").write_text("{}")
    checkpoints = solo(tmp_path, keep=3)
    checkpoints.latest(warn=lambda line: None)
    assert save(checkpoints, COMM, 25).name == "step-00000025-1"
    assert listing(tmp_path) == ["step-00000020", "step-00000025", "step-00000025-1"]
    checkpoints = solo(tmp_path)
    shutil.rmtree(tmp_path / "step-00000025")
    (tmp_path / "step-00000025-1" / "state.json").write_text("{}")
    checkpoints.latest(warn=lambda line: None)
    save(checkpoints, COMM, 35)
    assert listing(tmp_path) == ["step-00000020", "step-00000035"]
    assert cases.latest_step(tmp_path) == 35


@pytest.mark.parametrize("keep", [2, 3])
def test_as_many_are_kept_as_asked_for(tmp_path: Path, keep: int) -> None:
    saved(tmp_path, *range(1, 7), keep=keep)
    assert listing(tmp_path) == [f"step-{step:08d}" for step in range(7 - keep, 7)]


# -- files from elsewhere -----------------------------------------------------------------------


def sign(folder: Path, manifest: bytes) -> None:
    (folder / MANIFEST).write_bytes(manifest)
    (folder / SUM).write_text(f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    saved(folder, 1)
    return folder


@pytest.mark.heavy
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_forged_manifest_is_a_typed_error(whole: Path, data: st.DataObject) -> None:
    """Whatever a correctly signed manifest says: refused in words, or read."""
    folder = whole / "step-00000001"
    original = (folder / MANIFEST).read_bytes()
    values = json.loads(original)
    place = data.draw(st.sampled_from([values, values["files"][0], values["files"][-1]]))
    place[data.draw(st.sampled_from([*place, "other"]))] = data.draw(JSON)
    sign(folder, json.dumps(data.draw(st.just(values) | JSON)).encode())
    with contextlib.suppress(CheckpointError):  # any other error fails the test
        restored = solo(whole).latest(warn=lambda line: None)
        assert restored is not None
        wrongs(restored)
    sign(folder, original)


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", ".hidden", "a/b"])
def test_a_manifest_can_not_point_outside(tmp_path: Path, name: str) -> None:
    saved(tmp_path, 1)
    folder = tmp_path / "step-00000001"
    values = json.loads((folder / MANIFEST).read_bytes())
    values["files"].append({"name": name, "size": 0, "sha256": "0" * 64})
    sign(folder, json.dumps(values).encode())
    with pytest.raises(CheckpointError, match="pattern"):
        solo(tmp_path).latest(warn=lambda line: None)


@pytest.mark.parametrize("header", [2**63, 10**9, 200])
def test_a_bloated_tensor_header_is_refused(tmp_path: Path, header: int) -> None:
    saved(tmp_path, 1)
    folder = tmp_path / "step-00000001"
    path = folder / "weights-00001-of-00001.safetensors"
    data = header.to_bytes(8, "little") + path.read_bytes()[8:]
    path.write_bytes(data)
    values = json.loads((folder / MANIFEST).read_bytes())
    entry = next(entry for entry in values["files"] if entry["name"] == path.name)
    entry["sha256"] = hashlib.sha256(data).hexdigest()
    sign(folder, json.dumps(values).encode())
    restored = solo(tmp_path).latest()
    assert restored is not None
    with pytest.raises(CheckpointError, match=path.name):
        list(restored.tensors("weights"))


# -- content ------------------------------------------------------------------------------------


def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.T,
        "view of the same memory": base[1:],
        "scalar": torch.tensor(-0.0),
        "empty": torch.zeros(0, 3),
        "not a number": torch.tensor([float("nan"), float("inf")]),
        "half": base.to(torch.bfloat16),
        "double": base.double() / 3,
        "ids": torch.tensor([2**62 + 1, -1]),
        "flags": base > 5,
        "bytes": torch.arange(256).to(torch.uint8),
        "gradient": base.clone().requires_grad_(),
    }
    checkpoints = solo(tmp_path)
    checkpoints.save(7, {"weights": tensors}, {"a": [1, None, "ü"]}, {"run.yaml": "ü: 1\n"})
    restored = checkpoints.latest()
    assert restored is not None
    assert restored.state == {"a": [1, None, "ü"]}
    assert restored.texts == {"run.yaml": "ü: 1\n"}
    found = dict(restored.tensors("weights"))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        for copy in (found[name], restored.tensor("weights", name)):
            assert copy.dtype == tensor.dtype
            assert copy.shape == tensor.shape
            expected = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            assert torch.equal(copy.reshape(-1).view(torch.uint8), expected)
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        restored.tensor("weights", "nothing")


def test_what_is_read_outlives_the_files(tmp_path: Path) -> None:
    restored = saved(tmp_path, 1).latest()
    assert restored is not None
    tensors = dict(restored.tensors("weights"))
    for path in restored.folder.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    shutil.rmtree(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, cases.content(1, "weights", name))


def test_state_that_is_not_json_stops_before_anything_is_written(tmp_path: Path) -> None:
    for state in ({"loss": float("nan")}, {"rng": torch.zeros(2)}):
        with pytest.raises((ValueError, TypeError)):
            solo(tmp_path).save(1, {}, state, {})
    assert listing(tmp_path) == []


# -- ranks --------------------------------------------------------------------------------------


def test_four_ranks_write_and_three_or_one_read(tmp_path: Path) -> None:
    names = run_ranks(cases.save_three, 4, tmp_path)
    assert names == [["step-00000010", "step-00000020", "step-00000030"]] * 4
    assert listing(tmp_path) == ["step-00000020", "step-00000030"]
    assert "weights-00003-of-00004.safetensors" in listing(tmp_path / "step-00000030")
    assert cases.latest_step(tmp_path) == 30
    (tmp_path / "step-00000030" / "moments-00002-of-00004.safetensors").write_bytes(b"?")
    results = run_ranks(cases.read_latest, 3, tmp_path)
    assert [(step, wrong) for step, wrong, _ in results] == [(20, [])] * 3
    told = [warnings for *_, warnings in results]
    assert "moments-00002-of-00004.safetensors has 1 bytes" in told[0][0]
    assert told[1:] == [[], []]


def test_one_rank_that_can_not_write_stops_this_save_on_all(tmp_path: Path) -> None:
    """25 tensors of 2000 bytes, gathered one by one; then the same save with nothing in its way."""
    first, second = run_ranks(cases.failing_saves, 2, tmp_path)
    assert first == second
    assert len(first["errors"]) == 2
    assert "can't save step 2: rank 1: File too large" in first["errors"][0]
    assert "can't save step 2: rank 0: [Errno 27] File too large" in first["errors"][1]
    assert all("MiB and " in error and "free in" in error for error in first["errors"])
    assert " ".join(first["listing"]) == "step-00000001 | step-00000001 | step-00000001"
    assert first["values"] == {f"tensor-{k}": [float(k)] for k in range(25)}
    streamed = {name: size for name, size in first["files"].items() if "streamed" in name}
    assert len(streamed) == 7 + 6  # a file holds at most 5000 bytes of tensors
    assert "streamed-00002-of-00002-5.safetensors" in streamed
    assert all(size < 5000 + 500 for size in streamed.values())


def test_misuse_is_told_on_all_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    first, second = run_ranks(cases.misuses, 2, tmp_path / "checkpoints")
    assert first == second
    assert "weights/same.name" in first[0]
    assert "weights/a" in first[1]
    assert first[2] == ""
    assert "Not a directory" in first[3]


@pytest.mark.heavy
def test_a_stretch_of_a_stored_tensor_is_that_of_the_whole_in_a_row(tmp_path):
    stored = {
        "matrix": torch.randn(7, 5),
        "patches": torch.randn(4, 3, 2, 2),
        "row": torch.randn(9),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }
    checkpoints = solo(tmp_path)
    checkpoints.save(1, {"weights": stored}, {}, {})
    lazily = checkpoints.latest().lazily("weights")
    for name, whole in stored.items():
        flat = whole.reshape(-1)
        for begin in range(len(flat) + 1):
            for end in range(begin, len(flat) + 3):  # a share may be filled up beyond the end
                assert lazily.stretch(name, begin, end).equal(flat[begin:end]), (name, begin, end)


def test_who_reads_the_weights_alone_checks_no_byte_of_the_moments(tmp_path: Path) -> None:
    groups = {"weights": {"a": torch.ones(3)}, "moments": {"m/a": torch.ones(3)}}
    folder = solo(tmp_path).save(1, groups, {}, {})
    manifest = json.loads((folder / MANIFEST).read_text())
    (moments,) = (e["name"] for e in manifest["files"] if e["group"] == "moments")
    (folder / moments).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=moments):
        solo(tmp_path).latest(warn=lambda line: None)
    restored = Checkpointer(tmp_path, Comm.solo(), reads=("weights",)).latest()
    assert restored is not None
    assert restored.groups == ["weights"]
    assert restored.tensor("weights", "a").tolist() == [1.0] * 3
    (weights,) = (e["name"] for e in manifest["files"] if e["group"] == "weights")
    (folder / weights).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=weights):
        Checkpointer(tmp_path, Comm.solo(), reads=("weights",)).latest(warn=lambda line: None)
