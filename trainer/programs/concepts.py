"""Relate how often concepts occur in a run's captions to what its model knows of them.

OUT/bank.jsonl, counts.safetensors, shards/   what was counted (`trainer.concepts.count`)
OUT/table.csv       a row a concept and data set: frequency, right, samples
OUT/report.json     every figure, with its source; report.html and trend.png show them
"""

from __future__ import annotations

import base64
import csv
import html
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.comm import Comm, agreed
from trainer.concepts.bank import Bank, Concept
from trainer.concepts.count import Captions, count_shards
from trainer.concepts.counts import Counts
from trainer.concepts.plot import plot_trend
from trainer.concepts.tags import Tags
from trainer.concepts.trend import Table, trend
from trainer.config import EvalConfig
from trainer.data.decode import BadSample
from trainer.data.shards import DamagedSample, ShardSet
from trainer.errors import ConfigError, DataError
from trainer.evals.labels import class_of
from trainer.evals.long_tail import PerClass, per_class
from trainer.evals.samples import Record, values_of
from trainer.programs.workdir import encoder, open_workdir
from trainer.run import eval_context

Say = Callable[[str], None]
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def study_run(
    workdir: Path,
    out: Path,
    comm: Comm,
    *,
    frequency: str,
    seed: int,
    resamples: int,
    captions: Captions | None = None,
    tags: Path | None = None,
    threshold: float = 0.0,
    overrides: Sequence[str] = (),
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Count the classes of a run's zero-shot evaluations in its own training captions, evaluate
    its newest weights class by class, and report; the same figures on every rank."""
    trained = open_workdir(workdir, comm, overrides)
    asked = [entry for entry in trained.run.evals if entry.name == "zero_shot"]
    if not asked:
        raise ConfigError(
            f"{workdir} has no zero_shot evaluation, so no classes to relate; add one: "
            "evals='[{name: zero_shot, label: ..., data: SHARDS}]'"
        )
    context = eval_context(trained.run, comm, trained.tokenizer)
    encode = encoder(trained.model)
    found = {entry.label: _said(per_class(entry, encode, context), entry, say) for entry in asked}
    bank = _bank_of(found)
    told = captions or Captions({"en": "txt"}, {})
    tagged = None if tags is None else Tags(tags, bank, threshold)
    counts = count_shards(trained.run.data.train, bank, told, out, comm, tags=tagged, say=say)
    table = table_of(found, bank, counts, frequency)
    figures = {
        "source": {
            "frequency": frequency,
            "captions": trained.run.data.train,
            "fields": dict(told.fields),
            "lemmas": {name: told.lemma_source(name) for name in told.fields},
            "tags": None if tags is None else {"file": str(tags), "threshold": threshold},
            "counts": counts.source,
            "model": f"{workdir} at step {trained.restored.step}",
        },
        "pairs": counts.figures(),
        **trend(table, seed=seed, resamples=resamples),
    }
    agreed(comm, lambda: write_report(table, figures, out) if comm.is_main else None)
    return figures


def class_bank(spec: str, target: str) -> Bank:
    """The class names of shards, as zero-shot evaluations name them."""
    shards, names = ShardSet.open(spec), set()
    for index in range(len(shards)):
        try:
            raw = shards.read(index)
            name = class_of(Record(raw.sample_id, values_of(raw.fields)), target)
        except (BadSample, DamagedSample):
            continue
        names |= {name} - {None}
    if not names:
        raise DataError(f"no sample of {spec} has a class under {target!r}; name another key")
    return Bank.of_names(sorted(map(str, names)))


def _said(found: PerClass, config: EvalConfig, say: Say) -> PerClass:
    right, samples = int(found.right.sum()), int(found.samples.sum())
    say(f"{config.label}: {right} of {samples} samples right, {len(found.names)} classes")
    return found


def _bank_of(found: Mapping[str, PerClass]) -> Bank:
    """All class names, once each."""
    names = sorted({name for each in found.values() for name in each.names})
    return Bank(Concept(name, {"en": (name,)}) for name in names)


def table_of(found: Mapping[str, PerClass], bank: Bank, counts: Counts, frequency: str) -> Table:
    """A row for every class of every data set."""
    by_name = dict(zip(bank.names, counts.frequency(frequency).tolist(), strict=True))
    rows = [
        (label, name, by_name[name], right, samples)
        for label, each in found.items()
        for name, right, samples in zip(
            each.names, each.right.tolist(), each.samples.tolist(), strict=True
        )
    ]
    return _as_table(rows)


def read_table(path: Path) -> Table:
    """A CSV with the columns of `Table`, from any source."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [_row(line) for line in csv.DictReader(file)]
    except OSError as error:
        raise DataError(f"can't read the table {path}: {error.strerror}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} is no table of dataset,concept,frequency,right,samples ({error!r})"
        ) from None
    if (twice := Counter(row[:2] for row in rows).most_common(1)) and twice[0][1] > 1:
        dataset, concept = twice[0][0]
        raise DataError(f"{path} has {concept!r} of {dataset!r} twice; give each one row")
    for dataset, concept, count, right, samples in rows:
        if count < 0 or not 0 <= right <= samples or not samples:
            raise DataError(
                f"{path}: {concept!r} of {dataset!r} has frequency {count}, {right} of {samples} "
                "samples right; samples must be above zero and not fewer than the right ones"
            )
    return _as_table(rows)


def _row(line: Mapping[str, str]) -> tuple[str, str, int, int, int]:
    frequency, right, samples = (int(line[key]) for key in ("frequency", "right", "samples"))
    return line["dataset"], line["concept"], frequency, right, samples


def _as_table(rows: Sequence[tuple[str, str, int, int, int]]) -> Table:
    numbers = np.array([row[2:] for row in rows], np.int64).reshape(-1, 3)
    return Table([r[0] for r in rows], [r[1] for r in rows], *numbers.T)


def write_report(table: Table, figures: dict[str, Any], out: Path) -> None:
    """Table, figures, plot and page."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table._fields)
        writer.writerows(zip(*table, strict=True))
    text = json.dumps(_without_nan(figures), indent=1, ensure_ascii=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    source = str(figures["source"]["frequency"])
    plot_trend(table, figures, out / "trend.png", source=source)
    (out / "report.html").write_text(_page(figures, out / "trend.png"), encoding="utf-8")


def format_report(figures: Mapping[str, Any]) -> str:
    """What a terminal shows."""
    raw, within = figures["per_concept"], figures["within_datasets"]
    published, binomial = figures["binned_as_published"], figures["binomial"]
    lines = [
        f"{figures['rows']} concepts of {len(figures['datasets'])} data sets, "
        f"{figures['samples']} samples; seed {figures['seed']}",
        f"per concept:   r {raw['pearson']:.3f}, Spearman {raw['spearman']:.3f}, "
        f"{raw['slope']:.2f} points a decade",
        f"within sets:   r {within['r']:.3f}, {within['slope']:.2f} points a decade "
        f"{_limits(within)}",
        f"binomial:      {binomial['slope']:.3f} log-odds a decade {_limits(binomial)}",
        f"bin means:     rho {published['rho']:.3f} (as published; averaging hides the spread)",
        "frequency      concepts  samples  mean of concepts  of all samples",
    ]
    for level in figures["by_frequency"]:
        lines.append(
            f"{level['frequency']:14s} {level['rows']:8d} {level['samples']:8d} "
            f"{level['mean_of_concepts']:17.2f} {level['of_all_samples']:15.2f}"
        )
    return "\n".join(lines)


def _limits(found: Mapping[str, Any]) -> str:
    if found["interval"] is None:
        return "(no interval: too few concepts vary)"
    low, high = found["interval"]
    return f"[95 %: {low:.2f}, {high:.2f}]"


def _page(figures: Mapping[str, Any], picture: Path) -> str:
    image = base64.b64encode(picture.read_bytes()).decode()
    about = json.dumps(_without_nan(figures["source"]), indent=1, ensure_ascii=False)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<title>Concept frequency</title>"
        "<style>body{font:14px/1.5 system-ui,sans-serif;max-width:1100px;margin:auto;padding:20px}"
        "img{max-width:100%}pre{background:#f4f5f7;padding:12px;overflow:auto}</style>"
        "<h1>Concept frequency and accuracy</h1>"
        f"<pre>{html.escape(format_report(figures))}</pre>"
        f'<img alt="accuracy against frequency" src="data:image/png;base64,{image}">'
        f"<h2>Source</h2><pre>{html.escape(about)}</pre></html>"
    )


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null where a figure has no meaning."""
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and value != value else value
