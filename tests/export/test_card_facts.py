"""Licences as the samples state them, and nothing where they are silent."""

from __future__ import annotations

import json
from pathlib import Path

from tests.data.tars import write_tar
from trainer.data.index import write_index
from trainer.export.card_facts import figures_section, origin_section, stated_licences


def shard(path: Path, licences: list[str | None]) -> str:
    samples = {}
    for number, licence in enumerate(licences):
        values = {"name": f"n{number}"} | ({} if licence is None else {"license": licence})
        samples[f"{number:03}"] = {"json": json.dumps(values).encode()}
    write_tar(path, samples)
    write_index(str(path))
    return str(path)


def test_every_licence_is_named_with_its_count_and_the_silent_samples_too(tmp_path: Path) -> None:
    spec = shard(tmp_path / "a.tar", ["CC-BY-4.0", "CC-BY-4.0", "MIT", None, None])
    assert stated_licences(spec) == (
        "Trained on `a.tar`. Licences that its samples state, of 5 samples: CC-BY-4.0 (2), MIT (1)"
        "; 2 state none. The weights may be bound by their terms."
    )
    assert stated_licences(shard(tmp_path / "b.tar", [None])) is None
    assert stated_licences(str(tmp_path / "gone.tar")) is None


def test_sections_without_facts_are_left_out(tmp_path: Path) -> None:
    assert figures_section("", step=3) == ""
    assert origin_section(tmp_path, step=3) == ""
