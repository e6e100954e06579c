"""What `tools/scaling.py` does beside the sweep: plan a study, fit laws, write the page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.errors import DataError
from trainer.plan.cards import UTILISATION, card_of
from trainer.programs.sweep import collect
from trainer.scaling.compare import Comparison, compared
from trainer.scaling.cost import Costed, costs
from trainer.scaling.fit import HeldOut, Law, as_json, fit, held_out
from trainer.scaling.points import Points, columns, read_points
from trainer.scaling.report import Curve, write_page
from trainer.scaling.study import Study

LAWS = "laws.json"
PAGE = "report.html"


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
            f"{sum(each.flops_anew for each in own):>12.3g}{sum(each.hours for each in own):>14.1f}"
        )
    hours = sum(each.hours for each in found)
    lines.append(
        f"in all {sum(each.flops_anew for each in found):.3g} FLOPs, {hours:.1f} hours of {card} "
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
    return math.log10(max(e.flops for e in group) / min(e.flops for e in group))


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
