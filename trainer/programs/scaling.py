"""What `tools/scaling.py` does: plan a study, run its cells, fit laws, write the page."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from trainer.config import dump_run
from trainer.errors import ConfigError, DataError, TrainerError
from trainer.long_work import counted
from trainer.plan.cards import UTILISATION, Card, card_of
from trainer.plan.plan import Plan, planned
from trainer.programs.compare import is_finished, run_logged
from trainer.programs.workdir import logged_results
from trainer.scaling.compare import Comparison, compared
from trainer.scaling.fit import HeldOut, Law, as_json, fit, held_out
from trainer.scaling.points import Point, Points, columns, read_points
from trainer.scaling.report import Curve, write_page
from trainer.scaling.study import Cell, Study, cells

TABLE = "points.csv"
LAWS = "laws.json"
PAGE = "report.html"


class Costed(NamedTuple):
    """A cell with what it takes."""

    cell: Cell
    flops: float
    """Of the model, on all devices."""
    hours: float
    """Of all devices together."""
    parameters: int


def costs(study: Study, *, card: Card, world_size: int, utilisation: float) -> list[Costed]:
    """Every cell's, cheapest first. Sizes that differ in steps, seed and data alone are planned
    once."""
    every = list(cells(study))
    return sorted(
        (
            _cost(study, cell, card, world_size, utilisation, planner=_planner())
            for cell in counted(every, "planning", total=len(every), unit="trainings")
        ),
        key=lambda each: (each.flops, each.cell.name),
    )


@cache
def _planner() -> dict[tuple[object, ...], Plan]:
    return {}


def _cost(
    study: Study,
    cell: Cell,
    card: Card,
    world_size: int,
    utilisation: float,
    *,
    planner: dict[tuple[object, ...], Plan],
) -> Costed:
    own = [text for text in cell.overrides if not text.startswith("data.train=")]
    key = (str(study.base), cell.recipe, cell.model, tuple(own[:-3]), card, world_size)
    if key not in planner:
        planner[key] = planned(
            cell.config(study), card=card, world_size=world_size, utilisation=utilisation
        )
    plan = planner[key]
    steps = cell.samples // plan.config.global_batch
    share = steps / plan.config.steps
    return Costed(
        cell, plan.run_flops * share, plan.hours * share * world_size, plan.weights.learnt
    )


def plan_study(
    study: Study,
    *,
    card: str = "h100",
    world_size: int = 8,
    utilisation: float = UTILISATION,
) -> str:
    """Runs, FLOPs and device-hours of a study, by model and budget; and a cheaper one."""
    found = costs(study, card=card_of(card), world_size=world_size, utilisation=utilisation)
    lines = [
        f"{len(found)} trainings: {len(study.recipes)} recipes x {len(study.models)} models x "
        f"{len({each.cell.data for each in found})} amounts of data x "
        f"{len(study.samples_seen)} budgets x {len(study.seeds)} seeds",
        f"{'model':<16}{'weights':>10}{'trainings':>11}{'FLOPs':>12}{'device-hours':>14}",
    ]
    for model in study.models:
        own = [each for each in found if each.cell.model == model]
        lines.append(
            f"{model:<16}{own[0].parameters / 1e6:>8.1f} M{len(own):>11}"
            f"{sum(each.flops for each in own):>12.3g}{sum(each.hours for each in own):>14.1f}"
        )
    hours = sum(each.hours for each in found)
    lines.append(
        f"in all {sum(each.flops for each in found):.3g} FLOPs, {hours:.1f} hours of {card} "
        f"({hours / world_size:.1f} hours of {world_size} at once, at an assumed {utilisation:.0%} "
        "of their peak)"
    )
    return "\n".join([*lines, _cheapest(study, found)])


def _cheapest(study: Study, found: Sequence[Costed]) -> str:
    """The exponent's error falls with the root of points and with the decades they cover, so a
    study loses little without what is dearest: said is what half of the cells cost."""
    ordered = [each for each in found if each.cell.seed == study.seeds[0]]
    kept = ordered[: max(1, len(ordered) * 3 // 4)]
    decades = [_decades(group) for group in (ordered, kept)]
    share = sum(e.hours for e in kept) / max(sum(e.hours for e in found), 1e-300)
    return (
        f"the cheapest three quarters of one seed's cells cost {share:.0%} of that and cover "
        f"{decades[1]:.1f} of {decades[0]:.1f} decades of compute: begin with them"
    )


def _decades(group: Sequence[Costed]) -> float:
    import math

    return math.log10(max(e.flops for e in group) / min(e.flops for e in group))


# -- running -------------------------------------------------------------------------------------


def sweep(
    study: Study,
    *,
    part: int = 0,
    parts: int = 1,
    say: Callable[[str], None] = print,
) -> str:
    """Train what is not finished, cheapest first, and write the table; returns the last line.

    Of several workers each takes every `parts`-th cell. A cell that was begun goes on from its
    newest checkpoint. TrainerError at the end where cells failed; the others were run.
    """
    if not 0 <= part < parts:
        raise ConfigError(f"part {part + 1} of {parts}: the first is 1, the last {parts}")
    every = costs(study, card=card_of("cpu"), world_size=1, utilisation=UTILISATION)
    own = every[part::parts]
    left = [each for each in own if not is_finished(each.cell.workdir)]
    say(f"{len(own) - len(left)} of {len(own)} cells are done already")
    clock = _TimeLeft(len(own), left, say)
    with ThreadPoolExecutor(study.at_a_time) as pool:
        failures = [
            failure for failure in pool.map(lambda each: _run(study, each, clock), left) if failure
        ]
    collect(study)
    if failures:
        raise TrainerError(f"{len(failures)} cells failed; the first: {failures[0]}")
    return f"all {len(own)} cells are done; {study.workdir / TABLE}"


class _TimeLeft:
    """Says after each cell how long the others will take, by FLOPs."""

    def __init__(self, count: int, left: Sequence[Costed], say: Callable[[str], None]) -> None:
        self._count, self._to_do = count, len(left)
        self._flops, self._done, self._ended = sum(each.flops for each in left), 0.0, 0
        self._say, self._began = say, time.monotonic()

    def ended(self, each: Costed, failure: str) -> None:
        self._done += each.flops
        self._ended += 1
        seconds = time.monotonic() - self._began
        rest = seconds * (self._flops - self._done) / max(self._done, 1.0)
        state = f"failed: {failure}" if failure else "done"
        place = self._count - self._to_do + self._ended
        self._say(f"{place}/{self._count}  {each.cell.name}  {state}  {rest / 60:.0f} min left")


def _run(study: Study, each: Costed, clock: _TimeLeft) -> str:
    cell = each.cell
    try:
        run = cell.config(study)
        cell.workdir.mkdir(parents=True, exist_ok=True)
        path = cell.workdir / "cell.yaml"
        path.write_text(dump_run(run), encoding="utf-8")
        front = study.launcher or (sys.executable, "-m")
        failure = run_logged((*front, "trainer", str(path)), cell.workdir, cell.name)
    except TrainerError as error:
        failure = f"{cell.name}: {error}"
    clock.ended(each, failure)
    return failure


def collect(study: Study) -> list[Point]:
    """The points of the cells that are done, also in `points.csv`."""
    every = costs(study, card=card_of("cpu"), world_size=1, utilisation=UTILISATION)
    found = [_point(study, each) for each in every if is_finished(each.cell.workdir)]
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
    return Point(
        run=cell.name,
        error=max(1 - figures[study.figure] / 100, 1e-6),
        compute=each.flops,
        parameters=each.parameters,
        samples=cell.samples,
        unique_samples=float("nan") if unique is None else min(unique, cell.samples),
        recipe=cell.recipe,
        model=cell.model,
        corpus=study.corpus,
        schedule="cosine",
        metric=f"1 - {study.figure} of {study.evaluation}",
        seed=cell.seed,
        workdir=str(cell.workdir),
    )


# -- laws ----------------------------------------------------------------------------------------


class Fitted(NamedTuple):
    """All that is found about the points of a study."""

    curves: dict[str, Points]
    laws: dict[str, list[Law]]
    tests: dict[str, list[HeldOut]]
    comparisons: dict[str, Comparison]
    refused: list[str]
    """Laws that have too few points, and why."""


def fit_study(study: Study, table: Path | None = None) -> Fitted:
    """Laws of each recipe, their test on the last decade, and each two recipes compared.

    `table`: points of a file instead of the study's cells.
    """
    rows = collect(study) if table is None else read_points(table)
    names = list(dict.fromkeys(row.recipe for row in rows))
    if not names:
        raise DataError(f"no cell of {study.workdir} is finished; run the sweep first")
    curves = {name: columns(row for row in rows if row.recipe == name) for name in names}
    how = {
        "frontier": study.fit.frontier,
        "delta": study.fit.delta,
        "resamples": study.fit.resamples,
    }
    found = Fitted(curves, {}, {}, {}, [])
    for name, points in curves.items():
        found.laws[name], found.tests[name] = [], []
        for law in study.fit.laws:
            try:
                found.laws[name].append(fit(points, law, **how))  # type: ignore[arg-type]
            except DataError as error:
                found.refused.append(f"{name}, {law}: {error}")
                continue
            test = held_out(points, law, decades=study.fit.held_out_decades, **how)
            found.tests[name] += [] if test is None else [test]
    first = names[0]
    for other in names[1:]:
        if found.laws[first] and found.laws[other]:
            pair = (found.laws[first][0], found.laws[other][0])
            found.comparisons[f"{other} less {first}"] = compared(*pair)
    return found


def write_laws(study: Study, found: Fitted) -> Path:
    """`laws.json` in the study's folder."""
    path = study.workdir / LAWS
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "laws": {name: [as_json(law) for law in laws] for name, laws in found.laws.items()},
        "comparisons": {name: _plain(each) for name, each in found.comparisons.items()},
        "refused": found.refused,
    }
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


def _plain(comparison: Comparison) -> dict[str, object]:
    values = comparison._asdict()
    return values | {name: values[name]._asdict() for name in ("exponent", "offset")}


def told(found: Fitted) -> str:
    """The laws in lines."""
    lines = []
    for name, laws in found.laws.items():
        for law in laws:
            numbers = ", ".join(
                f"{key} {law.numbers[key]:.4g} [{low:.4g}, {high:.4g}]"
                for key, (low, high) in law.intervals.items()
            )
            count = f"{int(law.weight.sum())} of {len(law.points)} points"
            lines.append(f"{name}: {law.form.name} law of {count}: {numbers}")
        for test in found.tests[name]:
            worst = max(abs(test.relative_error), default=0.0)
            lines.append(
                f"{name}: {test.law.form.name} law without the last decade is off by {worst:.1%} "
                f"at most, {max(test.decades_beyond, default=0.0):.2f} decades beyond"
            )
    for name, each in found.comparisons.items():
        lines.append(f"{name}: {difference(each)}")
    return "\n".join([*lines, *found.refused])


def difference(each: Comparison) -> str:
    """A comparison in a sentence."""
    exponent = f"exponent {each.exponent.value:+.4f} [{each.exponent.low:+.4f}, "
    exponent += f"{each.exponent.high:+.4f}]"
    offset = f"log10 error at {each.middle:.3g} FLOPs {each.offset.value:+.4f} "
    offset += f"[{each.offset.low:+.4f}, {each.offset.high:+.4f}]"
    if each.crossover is None or each.crossover_interval is None:
        crossing = f"crossover: none in range ({each.share_that_cross:.0%} of draws cross)"
    else:
        low, high = each.crossover_interval
        crossing = f"crossover at {each.crossover:.3g} [{low:.3g}, {high:.3g}] FLOPs"
    return f"{exponent}; {offset}; {crossing}"


def report(study: Study, found: Fitted) -> Path:
    """The page, `report.html` in the study's folder."""
    curves = [
        Curve(name, points, found.laws[name], found.tests[name])
        for name, points in found.curves.items()
    ]
    sentences = {name: difference(each) for name, each in found.comparisons.items()}
    return write_page(
        study.workdir / PAGE,
        curves,
        title=f"Scaling of {', '.join(found.curves)} on {study.corpus}",
        sentences=sentences,
        notes=found.refused,
    )
