"""Train the cells of a study: a queue on a shared disk that any number of workers take from."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.lock import holder_of, only_worker
from trainer.comm import Comm
from trainer.config import dump_run, load_run
from trainer.errors import ConfigError, TrainerError
from trainer.plan.cards import UTILISATION, card_of
from trainer.programs.cells import Cells, is_finished
from trainer.programs.sweep_table import LiveTable, TimeLeft
from trainer.programs.workdir import logged_results
from trainer.scaling.cost import Costed, costs
from trainer.scaling.points import Point
from trainer.scaling.study import Cell, Study, Trunk

TABLE = "points.csv"
WAIT_SECONDS = 2.0
"""Between two looks at what somebody else trains."""


def sweep(
    study: Study,
    *,
    part: int = 0,
    parts: int = 1,
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Train what is not finished, cheapest first, and write the table; returns the last line.

    Of several workers each takes every `parts`-th chain: a cell, or the cells that cool one run
    down. A cell that was begun goes on from its newest checkpoint; one that another worker has in
    hand is waited for. TrainerError at the end where cells failed; the others were run. A signal,
    or `minutes` that are over, ends it after the cells that run have saved.
    """
    if not 0 <= part < parts:
        raise ConfigError(f"part {part + 1} of {parts}: the first is 1, the last {parts}")
    every = all_costs(study)
    own = _chains(every)[part::parts]
    left = [chain for chain in own if not all(is_finished(e.cell.workdir) for e in chain)]
    count = sum(map(len, own))
    to_do = [each for chain in left for each in chain if not is_finished(each.cell.workdir)]
    say(f"{count - len(to_do)} of {count} cells are done already")
    clock = TimeLeft(count, to_do, say)
    with (
        Cells(minutes=minutes) as started,
        LiveTable(every),
        ThreadPoolExecutor(study.at_a_time) as pool,
    ):
        queue = _Queue(study, started, clock)
        failures = [failure for found in pool.map(queue.train, left) for failure in found]
    collect(study)
    if failures:
        raise TrainerError(f"{len(failures)} cells failed; the first: {failures[0]}")
    if started.stopped and clock.num_done < count:
        return f"stopped with {clock.num_done} of {count} cells done; the same command goes on"
    return f"all {count} cells are done; {study.workdir / TABLE}"


def all_costs(study: Study) -> list[Costed]:
    """Every cell, cheapest first, with the FLOPs that stand in the table."""
    return costs(study, card=card_of("cpu"), world_size=1, utilisation=UTILISATION)


def _chains(every: Sequence[Costed]) -> list[list[Costed]]:
    """Cells that are trained one after the other, by what the whole of them costs."""
    ordered = sorted(every, key=lambda each: each.cell.chain)
    groups = groupby(ordered, key=lambda each: each.cell.chain)
    found = [sorted(group, key=lambda each: each.cell.steps) for _, group in groups]
    return sorted(found, key=lambda chain: sum(each.flops_anew for each in chain))


class _Queue(NamedTuple):
    """What a thread of the sweep needs to train a chain."""

    study: Study
    started: Cells
    clock: TimeLeft

    def train(self, chain: Sequence[Costed]) -> list[str]:
        """Train a chain's cells; what failed of them, in sentences."""
        failures = []
        for each in (e for e in chain if not is_finished(e.cell.workdir)):
            failure = self._until_done(each.cell)
            if failure or is_finished(each.cell.workdir):
                self.clock.ended(each, failure)
            failures += [failure] if failure else []
        return failures

    def _until_done(self, cell: Cell) -> str:
        """Train a cell, as soon as nobody else does; why it failed, or nothing."""
        while not self.started.stopped:
            try:
                with self._claimed(cell):
                    failure = "" if is_finished(cell.workdir) else self._trained(cell)
            except TrainerError as error:
                return f"{cell.name}: {error}"
            if not (failure and any(map(holder_of, _places(cell)))):  # a training of one that died
                return failure
        return ""

    @contextmanager
    def _claimed(self, cell: Cell) -> Iterator[None]:
        """Inside, no worker is at this cell or its trunk, nor a training that outlived its own."""
        said = False
        while True:
            with only_worker(_places(cell)[-1]) as free:
                busy = (
                    next(filter(None, map(holder_of, _places(cell))), None) if free else "another"
                )
                if busy is None or self.started.stopped:
                    yield
                    return
            if not said:
                self.clock.say(f"{cell.name} is in the hands of {busy}; waiting")
                said = True
            time.sleep(WAIT_SECONDS)

    def _trained(self, cell: Cell) -> str:
        """Train a cell to its end, and the trunk to where it begins."""
        begin: tuple[str, ...] = ()
        if cell.trunk is not None and _newest_step(cell.workdir) == 0:
            place, failure = self._grown(cell.trunk, f"{cell.name}, its trunk")
            if failure:
                return failure
            begin = () if place is None else (f"begin_from={place}",)
        return self._run_file((*cell.overrides, *begin), cell.workdir, cell.name)

    def _grown(self, trunk: Trunk, name: str) -> tuple[Path | None, str]:
        """The trunk's checkpoint at its step, and why it could not be trained to there.

        None where the trunk has passed it, as a budget that a study got later: the cell is then
        trained by itself, to the same numbers.
        """
        failure = ""
        if _newest_step(trunk.workdir) < trunk.step:
            failure = self._run_file(trunk.overrides, trunk.workdir, name)
        found = sorted((trunk.workdir / "checkpoints").glob(f"step-{trunk.step:08d}*"))
        return (found[-1] if found else None), failure

    def _run_file(self, overrides: Sequence[str], workdir: Path, name: str) -> str:
        """Write the run file of a training and run it."""
        if self.started.stopped:
            return ""
        run = load_run(self.study.base, overrides)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "cell.yaml"
        path.write_text(dump_run(run), encoding="utf-8")
        front = self.study.launcher or (sys.executable, "-m")
        return self.started.run((*front, "trainer", str(path)), workdir, name)


def _places(cell: Cell) -> list[Path]:
    """Folders in which a worker trains for a cell; who holds the last one has the cell."""
    return [cell.workdir, *([cell.trunk.workdir] if cell.trunk else [])]


def _newest_step(workdir: Path) -> int:
    restored = Checkpointer(workdir / "checkpoints", Comm.solo()).latest()
    return 0 if restored is None else restored.step


# -- the table -----------------------------------------------------------------------------------


def collect(study: Study) -> list[Point]:
    """The points of the cells that are done, also in `points.csv`."""
    found = [_point(study, each) for each in all_costs(study) if is_finished(each.cell.workdir)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Point.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(point.model_dump() for point in found)
    study.workdir.mkdir(parents=True, exist_ok=True)
    (study.workdir / TABLE).write_text(text.getvalue(), encoding="utf-8")
    return found


def _point(study: Study, each: Costed) -> Point:
    cell = each.cell
    results = logged_results(cell.workdir)
    figures = results.get(study.evaluation, {})
    if study.figure not in figures:
        there = ", ".join(f"{name}: {'/'.join(of)}" for name, of in results.items()) or "nothing"
        raise ConfigError(
            f"{cell.workdir} has no {study.figure!r} of an evaluation {study.evaluation!r}, only "
            f"{there}; set evaluation and figure"
        )
    unique = study.unique_samples.get(cell.data)
    known = {} if unique is None else {"unique_samples": min(unique, cell.samples)}
    return Point(
        **known,
        run=cell.chain,
        error=max(1 - figures[study.figure] / 100, 1e-6),
        compute=each.flops,
        parameters=each.parameters,
        samples=cell.samples,
        recipe=cell.recipe,
        model=cell.model,
        corpus=study.corpus,
        schedule=_schedule(study, cell),
        metric=f"1 - {study.figure} of {study.evaluation}",
        seed=cell.seed,
        workdir=str(cell.workdir),
    )


def _schedule(study: Study, cell: Cell) -> str:
    """What two cells must have in common to lie on one curve."""
    optim = cell.config(study).optim
    if optim.schedule == "cosine":
        return "cosine"
    share = optim.cooldown_steps / cell.steps if study.cooldown is None else study.cooldown
    return f"constant, {share:.2g} {optim.cooldown}"
