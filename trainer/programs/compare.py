"""Several variants of one run, each with several seeds, in one table with means and spreads."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue

from pydantic import ValidationError

from trainer.config import Frozen, LocalPath, PositiveInt, parse_run
from trainer.errors import ConfigError, TrainerError
from trainer.log.metrics import METRICS
from trainer.long_work import LongWork, tell
from trainer.programs.cells import Cells, is_finished
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
LOOK_SECONDS = 1.0
"""Between two looks at how far the cells are."""
_LONGEST_LINE = 256 * 1024


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
    """Cells that run beside each other, each in processes of its own."""


class Cell(Frozen):
    """One training run of the grid."""

    variant: str
    seed: int
    workdir: Path
    overrides: tuple[str, ...]
    """Of the base run."""

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.seed}"


class Spread(Frozen):
    """Where cells run."""

    ranks: PositiveInt = 1
    """Processes of each cell, started by torchrun where there are several."""
    devices: tuple[str, ...] = ()
    """Cards that the cells share out, `ranks` to each that runs; where none is named, as many cells
    as `at_a_time` run beside each other, and each sees all cards."""

    def places(self, at_a_time: int) -> list[str | None]:
        """One for each cell that runs at a time: what it sees of the cards, or None for all."""
        if not self.devices:
            return [None] * at_a_time
        if len(self.devices) % self.ranks:
            raise ConfigError(
                f"{len(self.devices)} devices can't be shared out to cells of {self.ranks} ranks; "
                "name a multiple of them, each rank has one"
            )
        starts = range(0, len(self.devices), self.ranks)
        return [",".join(self.devices[start : start + self.ranks]) for start in starts]


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
            overrides=(*comparison.shared, *overrides, f"seed={seed}", f"workdir={workdir}"),
        )
        for seed in comparison.seeds
        for name, overrides in comparison.variants.items()
    ]


def run_comparison(
    comparison: Comparison, spread: Spread | None = None, *, minutes: float | None = None
) -> str:
    """Train what is not finished, then write `table.md`, `.json` and `.png`; returns the table.

    A signal, or `minutes` that are over, ends it after the cells that run have saved; the table is
    then of what is finished, and the same command goes on.
    """
    spread = spread or Spread()
    places: SimpleQueue[str | None] = SimpleQueue()
    for place in (several := spread.places(comparison.at_a_time)):
        places.put(place)
    every = cells(comparison)
    front = launcher(spread.ranks)

    def run(cell: Cell) -> str:
        place = places.get()
        try:
            return _run(started, cell, (*front, str(comparison.base)), place)
        finally:
            places.put(place)

    ends = {cell.workdir: _steps(comparison.base, cell) for cell in every}
    started = Cells(minutes=minutes)
    with started, ThreadPoolExecutor(len(several)) as pool:
        failures = _watched({pool.submit(run, cell): cell for cell in every}, ends)
    if failures:
        raise TrainerError(f"{len(failures)} cells failed; the first: {failures[0]}")
    table = write_table(comparison)
    return f"{table}\nstopped; the same command goes on from here" if started.stopped else table


def launcher(ranks: int) -> tuple[str, ...]:
    """What starts a training of so many ranks on this machine."""
    if ranks == 1:
        return (sys.executable, "-m", "trainer")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return (sys.executable, "-m", *torchrun, "-m", "trainer")


def _steps(base: Path, cell: Cell) -> int:
    return parse_run(base.read_text(encoding="utf-8"), cell.overrides, source=str(base)).steps


def _watched(running: Mapping[Future[str], Cell], ends: Mapping[Path, int]) -> list[str]:
    """Tell how many steps all cells have taken, until they have ended; why some failed."""
    begun = {folder: min(end, steps_taken(folder)) for folder, end in ends.items()}
    left, seen = set(running), sum(begun.values())
    failures: list[str] = []
    with LongWork(f"{len(running)} cells", total=sum(ends.values()) - seen, unit="steps") as work:
        while left:
            ended, left = wait(left, timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED")
            for future in ended:
                failure = future.result()
                failures += [failure] if failure else []
                done = f"{len(running) - len(left)} of {len(running)} cells have ended"
                tell(f"{running[future].name}: {'failed' if failure else 'finished'} ({done})")
            taken = sum(min(end, steps_taken(folder)) for folder, end in ends.items())
            if taken > seen:
                work.done(taken - seen)
                seen = taken
    return failures


def steps_taken(workdir: Path) -> int:
    """By the newest line of a run's metrics; 0 where there is none yet."""
    try:
        with (workdir / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_LINE))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def write_table(comparison: Comparison) -> str:
    """The table of the cells that are finished so far, under the floors of the same figures."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in comparison.variants}
    floors: dict[str, list[dict[str, float]]] = {}
    for cell in cells(comparison):
        if is_finished(cell.workdir):
            results = logged_results(cell.workdir)
            found[cell.variant].append(_figures(results, comparison.figures))
            floors = {name: [_floor(results, comparison.figures, name)] for name in FLOORS}
    if not any(found.values()):
        raise ConfigError(
            f"no cell of {comparison.workdir} has finished, so there is no table yet; run the "
            "comparison without --table first"
        )
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


def format_comparison(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: one row per variant, mean ± sample standard deviation over its seeds."""
    columns = list(dict.fromkeys(key for runs in found.values() for run in runs for key in run))
    lines = [_row(["variant", "seeds", *columns]), _row(["---"] * (len(columns) + 2))]
    for name, runs in found.items():
        values = [[run[column] for run in runs if column in run] for column in columns]
        lines.append(_row([name, str(len(runs)), *map(_spread, values)]))
    return "\n".join(lines)


def _run(started: Cells, cell: Cell, front: Sequence[str], cards: str | None) -> str:
    seen = {} if cards is None else {"CUDA_VISIBLE_DEVICES": cards}
    return started.run((*front, *cell.overrides), cell.workdir, cell.name, environment=seen)


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
