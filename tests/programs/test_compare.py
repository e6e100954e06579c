"""A grid of runs: real cells, a table with spreads, nothing run twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.fixtures.emoji import write_shards
from tests.test_launch import RUN
from trainer.errors import ConfigError, TrainerError
from trainer.programs.compare import (
    cells,
    format_comparison,
    load_comparison,
    run_comparison,
    write_table,
)


def grid_in(folder: Path, **changes: object) -> Path:
    spec = write_shards(folder / "shards", count=24, per_shard=12)
    base = folder / "base.yaml"
    base.write_text(RUN.format(workdir=folder / "base", spec=spec))
    clip = "recipe={name: clip, model: {preset: tiny, text_length: 8, vocabulary: 300}}"
    grid = {
        "workdir": str(folder / "grid"),
        "base": str(base),
        "shared": ["steps=2"],
        "variants": {"clip": [clip], "protoclip": []},
        "seeds": [0],
        "at_a_time": 2,
        **changes,
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    return path


def test_a_grid_trains_each_cell_once_and_writes_its_table(tmp_path):
    comparison = load_comparison(grid_in(tmp_path))
    table = run_comparison(comparison)
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == ["chance", "clip", "protoclip"]
    found = json.loads((tmp_path / "grid/table.json").read_text())
    assert set(found["clip"][0]) == {"names top1"}
    logs = [cell.workdir / "output.log" for cell in cells(comparison)]
    assert run_comparison(comparison) == table
    assert all("nothing left to do" in log.read_text() for log in logs)
    more = comparison.model_copy(update={"seeds": (0, 1)})
    (begun,) = {cell.workdir for cell in cells(more) if cell.variant == "clip" and cell.seed == 1}
    begun.mkdir(parents=True)
    (begun / "events.jsonl").touch()
    assert write_table(more) == table, "a cell that is not finished has no figures yet"


def test_a_cell_that_fails_is_named_with_its_log(tmp_path):
    path = grid_in(tmp_path, variants={"wrong": ["recipe.clusters=99999"]})
    with pytest.raises(TrainerError, match=r"wrong, seed 0 \(exit 2\)"):
        run_comparison(load_comparison(path))
    with pytest.raises(ConfigError, match="variantz"):
        load_comparison(grid_in(tmp_path, variantz={}))


def test_means_and_sample_deviations():
    table = format_comparison({"a": [{"x": 1.0}, {"x": 3.0}, {"x": 5.0}], "b": [{"x": 2.0}]})
    assert table.splitlines()[2:] == ["| a | 3 | 3.0 ± 2.0 |", "| b | 1 | 2.0 |"]
