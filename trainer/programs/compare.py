"""Several variants of one run, each with several seeds, in one table with means and spreads."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import Frozen, LocalPath, PositiveInt, parse_run
from trainer.errors import ConfigError, TrainerError
from trainer.programs.compare_plot import plot_comparison
from trainer.programs.workdir import logged_results
from trainer.settings.errors import explain
from trainer.settings.text import read_mapping

FLOORS = {
    "chance": {"top1": "chance"},
    "nearest pixels": {"top1": "pixel_1nn", "top5": "pixel_5nn"},
}
"""What costs no training: how evaluations call it, where that is not `<floor>_<figure>`."""
PLOT = "table.png"


class Comparison(Frozen):
    """A grid: every variant is the base run with its own overrides, once per seed."""

    workdir: LocalPath
    """Each cell trains in `workdir/<variant>/seed-<n>`; finished ones are not run again."""
    base: LocalPath
    """The run that all variants share."""
    shared: tuple[str, ...] = ()
    """Overrides of all cells, `key=value`."""
    variants: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...] = (0, 1, 2)
    figures: tuple[str, ...] = ("top1", "image_to_text_r1", "text_to_image_r1")
    """Which numbers of each evaluation the table shows."""
    at_a_time: PositiveInt = 1
    """Cells that run beside each other, each in a process of its own."""


class Cell(Frozen):
    """One training run of the grid."""

    variant: str
    seed: int
    workdir: Path
    command: tuple[str, ...]


def load_comparison(path: Path) -> Comparison:
    try:
        values = read_mapping(path.read_text(encoding="utf-8"), (), source=str(path))
        return Comparison.model_validate(values)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Comparison)}") from error


def cells(comparison: Comparison) -> list[Cell]:
    """All cells, seed by seed, so that an interrupted grid has whole seeds."""
    return [
        Cell(
            variant=name,
            seed=seed,
            workdir=(workdir := comparison.workdir / name / f"seed-{seed}"),
            command=(
                sys.executable,
                "-m",
                "trainer",
                str(comparison.base),
                *comparison.shared,
                *overrides,
                f"seed={seed}",
                f"workdir={workdir}",
            ),
        )
        for seed in comparison.seeds
        for name, overrides in comparison.variants.items()
    ]


def run_comparison(comparison: Comparison) -> str:
    """Train what is not finished, then write `table.md`, `.json` and `.png`; returns the table."""
    with ThreadPoolExecutor(comparison.at_a_time) as pool:
        failures = [line for line in pool.map(_run, cells(comparison)) if line]
    if failures:
        raise TrainerError(f"{len(failures)} cells failed; the first: {failures[0]}")
    return write_table(comparison)


def write_table(comparison: Comparison) -> str:
    """The table of the cells that are finished so far, under the floors of the same figures."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in comparison.variants}
    floors: dict[str, list[dict[str, float]]] = {}
    for cell in cells(comparison):
        if is_finished(cell.workdir):
            results = logged_results(cell.workdir)
            found[cell.variant].append(_figures(results, comparison.figures))
            floors = {name: [_floor(results, comparison.figures, name)] for name in FLOORS}
    rows = {**floors, **found}
    table = format_comparison({name: runs for name, runs in rows.items() if any(runs)})
    (comparison.workdir / "table.md").write_text(table + "\n")
    (comparison.workdir / "table.json").write_text(json.dumps(found, indent=2) + "\n")
    plot_comparison(
        {name: runs for name, runs in found.items() if runs},
        comparison.workdir / PLOT,
        {name: runs[0] for name, runs in floors.items()},
    )
    return table


def is_finished(workdir: Path) -> bool:
    """Whether a run has taken all of its steps."""
    restored = Checkpointer(workdir / "checkpoints", Comm.solo()).latest()
    return restored is not None and restored.step >= parse_run(restored.texts["run.yaml"]).steps


def format_comparison(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: one row per variant, mean ± sample standard deviation over its seeds."""
    columns = list(dict.fromkeys(key for runs in found.values() for run in runs for key in run))
    lines = [_row(["variant", "seeds", *columns]), _row(["---"] * (len(columns) + 2))]
    for name, runs in found.items():
        values = [[run[column] for run in runs if column in run] for column in columns]
        lines.append(_row([name, str(len(runs)), *map(_spread, values)]))
    return "\n".join(lines)


def _run(cell: Cell) -> str:
    return run_logged(cell.command, cell.workdir, f"{cell.variant}, seed {cell.seed}")


def run_logged(command: Sequence[str], workdir: Path, name: str) -> str:
    """Run a training whose output goes to `output.log` in its workdir; why it failed, or nothing.

    What was begun goes on from its newest checkpoint, and what is finished ends at once.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "output.log").open("a") as log:
        result = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if result.returncode == 0:
        return ""
    return f"{name} (exit {result.returncode}): {workdir}/output.log"


def _figures(results: Mapping[str, Mapping[str, float]], wanted: Iterable[str]) -> dict[str, float]:
    return {
        f"{label} {name}": figures[name]
        for label, figures in results.items()
        for name in wanted
        if name in figures
    }


def _floor(
    results: Mapping[str, Mapping[str, float]], wanted: Iterable[str], floor: str
) -> dict[str, float]:
    """What `FLOORS` reaches at each figure, where the evaluation says so."""
    return {
        f"{label} {name}": figures[key]
        for label, figures in results.items()
        for name in wanted
        for key in [FLOORS[floor].get(name, f"{floor}_{name}")]
        if name in figures and key in figures
    }


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
