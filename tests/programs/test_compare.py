"""A grid of runs: real cells, a table with spreads, nothing run twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.fixtures.emoji import write_shards
from tests.test_launch import RUN
from trainer.errors import ConfigError, TrainerError
from trainer.programs.cells import Cells
from trainer.programs.compare import (
    Spread,
    cells,
    format_comparison,
    load_comparison,
    run_comparison,
    steps_taken,
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


@pytest.mark.heavy
def test_a_grid_trains_each_cell_once_and_writes_its_table(tmp_path, capsys):
    """Two cells at a time, each of two ranks with the cards that are its own."""
    comparison = load_comparison(grid_in(tmp_path))
    with pytest.raises(ConfigError, match=r"no cell of .* has finished"):
        write_table(comparison)
    table = run_comparison(comparison, Spread(ranks=2, devices=("4", "5", "6", "7")))
    said = capsys.readouterr()
    told = said.out + said.err
    assert "protoclip, seed 0: finished" in told
    assert "(2 of 2 cells have ended)" in told
    starts = [json.loads((c.workdir / "environment.json").read_text()) for c in cells(comparison)]
    assert [start[-1]["ranks"] for start in starts] == [2, 2]
    assert [steps_taken(cell.workdir) for cell in cells(comparison)] == [2, 2]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == ["chance", "clip", "protoclip"]
    found = json.loads((tmp_path / "grid/table.json").read_text())
    assert set(found["clip"][0]) == {"names top1"}
    logs = [cell.workdir / "output.log" for cell in cells(comparison)]
    assert run_comparison(comparison) == table
    assert all("nothing left to do" in log.read_text() for log in logs)
    _lose_evaluations(cells(comparison)[0].workdir)
    with_less = write_table(comparison)
    assert with_less != table, "all steps without their evaluation are no finished cell"
    assert run_comparison(comparison) == table, "the evaluation is made again, with its figures"
    more = comparison.model_copy(update={"seeds": (0, 1)})
    (begun,) = {cell.workdir for cell in cells(more) if cell.variant == "clip" and cell.seed == 1}
    begun.mkdir(parents=True)
    (begun / "events.jsonl").touch()
    assert write_table(more) == table, "a cell that is not finished has no figures yet"


def _lose_evaluations(workdir: Path) -> None:
    """As a run that was stopped between its last step and its evaluation."""
    events = workdir / "events.jsonl"
    kept = [line for line in events.read_text().splitlines() if '"event": "names"' not in line]
    events.write_text("".join(f"{line}\n" for line in kept))


def test_cards_are_shared_out_to_cells():
    assert Spread().places(3) == [None, None, None]
    assert Spread(devices=("0", "1", "3")).places(1) == ["0", "1", "3"]
    assert Spread(ranks=2, devices=("0", "1", "2", "3")).places(1) == ["0,1", "2,3"]
    with pytest.raises(ConfigError, match="3 devices can't be shared out to cells of 2 ranks"):
        Spread(ranks=2, devices=("0", "1", "2")).places(1)


def test_a_cell_sees_the_cards_of_its_place_and_no_others(tmp_path):
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    seen = {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert Cells().run([sys.executable, "-c", code], tmp_path, "one", environment=seen) == ""
    assert (tmp_path / "output.log").read_text() == "2,3\n"


def test_steps_are_those_of_the_newest_whole_line(tmp_path):
    assert steps_taken(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 12}\n{"st')
    assert steps_taken(tmp_path) == 12


def test_a_cell_that_fails_is_named_with_its_log(tmp_path):
    path = grid_in(tmp_path, variants={"wrong": ["recipe.clusters=99999"]})
    with pytest.raises(TrainerError, match=r"wrong, seed 0 \(exit 2\)"):
        run_comparison(load_comparison(path))
    with pytest.raises(ConfigError, match="variantz"):
        load_comparison(grid_in(tmp_path, variantz={}))


def test_means_and_sample_deviations():
    table = format_comparison({"a": [{"x": 1.0}, {"x": 3.0}, {"x": 5.0}], "b": [{"x": 2.0}]})
    assert table.splitlines()[2:] == ["| a | 3 | 3.0 ± 2.0 |", "| b | 1 | 2.0 |"]
