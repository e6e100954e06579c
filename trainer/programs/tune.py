"""Tune classifiers on stored features and compare them, inside and outside the training domain.

OUT/features/      a store for the training set and one for each test set (unless given)
OUT/cells/         what each classifier gave with each seed: where a killed call goes on
OUT/results.json   every accuracy, by classifier and seed; spectra of the features
OUT/table.md       mean and standard deviation over seeds; OUT/tune.png the same as a picture
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.comm import Comm, agreed
from trainer.errors import ConfigError, DataError
from trainer.programs.compare import format_comparison
from trainer.programs.compare_plot import plot_comparison
from trainer.programs.embed import open_teacher
from trainer.store import EmbeddingStore
from trainer.store.header import write_whole
from trainer.store.images import refuse_another_encoder
from trainer.teachers.fill import embed
from trainer.teachers.image import ImageTeacher
from trainer.teachers.spec import TeacherSpec
from trainer.tuning.features import LabelledStore, open_labelled
from trainer.tuning.fit import PRESETS, tune
from trainer.tuning.measure import accuracy, logistic, spread, tuned_classify, tuned_features
from trainer.tuning.views import ImageViews

TRAIN, CELLS = "train", "cells"
LOGISTIC = "logistic"
METHODS = (*PRESETS, LOGISTIC)
"""`linear`, `mlp`, `paper` and `repo` by AdamW; `logistic` by L-BFGS over several penalties."""
Say = Callable[[str], None]


class Sets(NamedTuple):
    """What is trained on, and what is tested on by name."""

    train: LabelledStore
    tests: Mapping[str, LabelledStore]


def embed_sets(
    spec: TeacherSpec, shards: Mapping[str, str], folder: Path, comm: Comm, *, views: int, say: Say
) -> None:
    """Fill FOLDER/NAME for every name: `views` random views and the whole image for TRAIN, the
    whole image alone for others. A store that is there is looked at and not computed again."""
    teacher = open_teacher(spec, comm)
    if not isinstance(teacher, ImageTeacher):
        raise ConfigError(f"{spec.model} reads no images; give a vision model or a run's workdir")
    for name, each in shards.items():
        count = views if name == TRAIN else 0
        with_views = ImageViews(teacher, count=count, seed=0)
        done = embed(each, folder / name, teacher=with_views, comm=comm)
        say(f"features of {name}: {done.computed} of {done.shards} shards computed")


def open_sets(shards: Mapping[str, str], folder: Path, target: str, comm: Comm) -> Sets:
    """The stores FOLDER/NAME with their classes; all in the numbers of the training set's."""
    fit = open_labelled(folder / TRAIN, shards[TRAIN], target, comm)
    if len(fit.names) < 2:
        raise DataError(
            f"{shards[TRAIN]} has the one class {fit.names[0]!r} under {target!r}; there is "
            "nothing to tell apart"
        )
    tests = {
        name: open_labelled(folder / name, spec, target, comm, names=fit.names)
        for name, spec in shards.items()
        if name != TRAIN
    }
    for name, data in tests.items():
        refuse_another_encoder(data.store, fit.store)
        if shared := _shards(data.store) & _shards(fit.store):
            raise DataError(
                f"the shard {min(shared)[0]} of the test set {name} is trained on; leave it out of "
                "one of the two"
            )
    return Sets(fit, tests)


def _shards(store: EmbeddingStore) -> set[tuple[str, str]]:
    """Names with digests: another set may have shards of the same names."""
    return {(name, entry.source) for name, entry in store.header.shards.items()}


def compare_methods(
    sets: Sets, methods: Sequence[str], seeds: Sequence[int], out: Path, comm: Comm, *, say: Say
) -> str:
    """Every method with every seed on every test set; writes the results and gives the table."""
    found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    spectra: dict[str, Any] = {
        "frozen": {n: spread(lambda rows: rows, d, comm) for n, d in sets.tests.items()}
    }
    for method in methods:
        for seed in seeds:
            figures, spectrum = _kept(sets, method, seed, out / CELLS, comm)
            found[method].append(figures)
            spectra[f"{method} seed {seed}"] = spectrum
            told = ", ".join(f"{name} {value:.1f}" for name, value in figures.items())
            say(f"{method} seed {seed}: {told} %")
    table = _table(sets, found, spectra, seeds)
    agreed(comm, lambda: _write(out, sets, found, spectra, seeds, table) if comm.is_main else None)
    return table


def _kept(
    sets: Sets, method: str, seed: int, folder: Path, comm: Comm
) -> tuple[dict[str, float], dict[str, Any]]:
    """What a cell gave before, if it was asked the same; else it is measured and kept."""
    path, asked = folder / f"{method}-{seed}.json", _asked(sets, method)
    found = comm.broadcast_json(_read_cell(path, asked) if comm.is_main else None)
    if found is None:
        found = list(_measured(sets, method, seed, comm))
        text = json.dumps({"asked": asked, "found": found}, indent=1)
        agreed(comm, (lambda: _write_cell(path, text)) if comm.is_main else lambda: None)
    figures, spectrum = found
    return figures, spectrum


def _asked(sets: Sets, method: str) -> str:
    """SHA-256 of the features, the classes and the settings."""
    stores = [(TRAIN, sets.train), *sets.tests.items()]
    digest = hashlib.sha256()
    for name, data in stores:
        digest.update(f"{name}\n{data.store.header.model_dump_json()}\n".encode())
        digest.update(data.labels.numpy().tobytes())
    settings = PRESETS[method].model_dump_json() if method in PRESETS else method
    digest.update(f"{sets.train.names}\n{settings}".encode())
    return digest.hexdigest()


def _read_cell(path: Path, asked: str) -> Any:
    if not path.exists():
        return None
    cell = json.loads(path.read_text())
    return cell["found"] if cell["asked"] == asked else None


def _write_cell(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


def _measured(
    sets: Sets, method: str, seed: int, comm: Comm
) -> tuple[dict[str, float], dict[str, Any]]:
    if method == LOGISTIC:
        classify, penalty = logistic(sets.train, seed=seed, comm=comm)
        return _accuracies(classify, sets, comm), {"penalty": penalty}
    model = tune(sets.train, PRESETS[method], seed=seed, comm=comm)
    features = tuned_features(model, comm)
    spectrum = {name: spread(features, data, comm) for name, data in sets.tests.items()}
    return _accuracies(tuned_classify(model, comm), sets, comm), spectrum


def _accuracies(classify: Any, sets: Sets, comm: Comm) -> dict[str, float]:
    return {name: accuracy(classify, data, comm) for name, data in sets.tests.items()}


def _table(
    sets: Sets,
    found: Mapping[str, Sequence[Mapping[str, float]]],
    spectra: Mapping[str, Any],
    seeds: Sequence[int],
) -> str:
    """Accuracies; then the spectra of what the classifiers read."""
    lines = [
        f"{len(sets.train.ids)} training samples of {len(sets.train.names)} classes, "
        f"{sets.train.num_views} views each; seeds {', '.join(map(str, seeds))}; top-1 in percent"
        + (f"; {sets.train.without} more have no vector" if sets.train.without else ""),
        *(f"{name}: {_about(data)}" for name, data in sets.tests.items()),
        "",
        format_comparison(found),
        "",
        "| features | test set | SVE | LSVR | SVE centred | LSVR centred |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for what in dict.fromkeys(name.partition(" seed ")[0] for name in spectra):
        of_seeds = [value for name, value in spectra.items() if name.partition(" seed ")[0] == what]
        for test in sets.tests:
            if all(test in each for each in of_seeds):
                cells = [
                    f"{statistics.mean(each[test][key] for each in of_seeds):.3f}"
                    for key in ("sve", "lsvr", "sve_centred", "lsvr_centred")
                ]
                lines.append(f"| {what} | {test} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _about(data: LabelledStore) -> str:
    unknown = int((data.labels < 0).sum())
    left = f", {unknown} of classes that were not learnt, which count as wrong" if unknown else ""
    lost = f"; {data.without} more have no vector" if data.without else ""
    return f"{len(data.ids)} samples{left}{lost}"


def _write(
    out: Path,
    sets: Sets,
    found: Mapping[str, Sequence[Mapping[str, float]]],
    spectra: Mapping[str, Any],
    seeds: Sequence[int],
    table: str,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "seeds": list(seeds),
        "features": sets.train.store.identity.model_dump(),
        "settings": {name: PRESETS[name].model_dump() for name in found if name in PRESETS},
        "accuracy": found,
        "spectra": spectra,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.md").write_text(table + "\n")
    plot_comparison(found, out / "tune.png", {})
