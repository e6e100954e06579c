"""Experiments with frozen teachers: the grid's cells are the run files, and a tiny one runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.fixtures.emoji import write_shards
from tests.fixtures.vectors import write_vectors
from tests.test_launch import RUN
from trainer.config import RunConfig, load_run
from trainer.programs.compare import cells, load_comparison, run_comparison
from trainer.programs.compare_plot import plot_comparison

RUNS = Path(__file__).parents[2] / "launch" / "runs"
GRID = RUNS / "compare_pbt.yaml"


def comparable(config: RunConfig) -> dict[str, object]:
    return config.model_dump(exclude={"workdir", "seed"})


def test_every_cell_of_the_grid_is_one_of_the_run_files() -> None:
    comparison = load_comparison(GRID)
    assert comparison.seeds == (0, 1, 2)
    grid = cells(comparison)
    assert len(grid) == 5 * 3
    for cell in grid:
        overrides = comparison.variants[cell.variant]
        expected = load_run(RUNS / f"pbt_{cell.variant}.yaml")
        found = load_run(RUNS / Path(comparison.base).name, overrides)
        assert comparable(found) == comparable(expected), cell.variant
    teachers = [load_run(path).recipe.teachers for path in sorted(RUNS.glob("pbt_*.yaml"))]
    assert sorted(len(entries) for entries in teachers) == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["flame_quick", "flame_vitb16_cc3m", "clip_llm"])
def test_other_runs_are_read(name: str) -> None:
    assert load_run(RUNS / f"{name}.yaml").recipe.name == name.split("_")[0]


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.heavy
def test_a_tiny_grid_with_teachers_trains_and_draws(tmp_path: Path) -> None:
    """Two real cells of 100 steps: the cell with teachers has their terms in its metrics, its
    groups are kept in its workdir, and not a byte of the teachers' vectors has changed."""
    spec = write_shards(tmp_path / "shards", count=24, per_shard=12)
    write_vectors(tmp_path / "store", spec, vectors=3)
    base = tmp_path / "base.yaml"
    base.write_text(RUN.format(workdir=tmp_path / "base", spec=spec))
    entries = [
        f"{{name: pooled, store: {tmp_path}/store, clusters: 4, pca: 3, target_temperature: 0.1}}",
        f"{{name: facets, store: {tmp_path}/store, clusters: 3, facets: each, vectors: [0, 2]}}",
    ]
    grid = {
        "workdir": str(tmp_path / "grid"),
        "base": str(base),
        "shared": ["steps=100", "recipe.warmup_episodes=0", "log_every=1 steps"],
        "variants": {"none": [], "teachers": [f"recipe.teachers=[{', '.join(entries)}]"]},
        "seeds": [0],
        "at_a_time": 2,
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    before = bytes_in(tmp_path / "store")
    table = run_comparison(load_comparison(tmp_path / "grid.yaml"))
    assert "| none | 1 |" in table
    assert "| teachers | 1 |" in table
    workdir = tmp_path / "grid" / "teachers" / "seed-0"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    terms = {f"{s}_from_{t}" for s in ("image", "text") for t in ("pooled", "facets-0", "facets-2")}
    assert terms <= lines[-1]["values"].keys()
    assert bytes_in(tmp_path / "store") == before
    kept = {path.name for path in (workdir / "teachers").iterdir()}
    assert kept == {"pooled", "facets"}
    assert (tmp_path / "grid" / "table.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.heavy
def test_a_comparison_is_drawn_whatever_is_missing(tmp_path: Path) -> None:
    plot_comparison(
        {"a": [{"x": 1.0}, {"x": 2.0, "y": 3.0}], "b": [{"y": 1.0}]},
        tmp_path / "p.png",
        {"chance": {"x": 0.5}, "pixels": {}},
    )
    assert (tmp_path / "p.png").stat().st_size > 1000
    plot_comparison({}, tmp_path / "none.png", {})
    assert not (tmp_path / "none.png").exists()
