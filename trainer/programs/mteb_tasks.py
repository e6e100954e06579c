"""Shards as tasks of `mteb`, with which its own code measures an export on data of one's own.

The package's tasks fetch their data from a hub. These have theirs from shards, and go the same way
through its loaders, its evaluators and its results.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.decode import BadSample
from trainer.data.fields import find_image
from trainer.data.shards import DamagedSample, ShardSet
from trainer.errors import ConfigError, DataError
from trainer.evals.labels import class_of
from trainer.evals.pairing import texts_of
from trainer.evals.samples import Record, values_of
from trainer.export.mteb_model import MtebModel
from trainer.long_work import counted

PACKAGES = "mteb datasets==3.6.0 pyarrow==19.0.1 dill==0.3.8 multiprocess==0.70.16"
"""Releases that work together: of newer ones of `datasets` and `dill` one can't write tables."""
SPLIT = "test"


class Sample(NamedTuple):
    picture: str
    """Equal for samples that show the same picture."""
    image: bytes
    name: str | None
    """Of its class."""
    texts: list[str]


def measure(
    folder: Path, spec: str, *, target: str | None, caption: str | None, template: str, batch: int
) -> dict[str, dict[str, float]]:
    """Scores by the name of the task, of every split in one.

    Zero-shot classification where there is a `target`, and retrieval both ways where there is a
    `caption`. ConfigError where mteb or what it needs is not installed, DataError where no sample
    has the key.
    """
    mteb = needed("mteb")
    samples = read_samples(spec, target=target, caption=caption)
    tasks = [] if target is None else [zero_shot_task(samples, template=template)]
    tasks += [] if caption is None else retrieval_tasks(samples)
    found = mteb.evaluate(
        MtebModel(folder),
        tasks=tasks,
        cache=None,
        encode_kwargs={"batch_size": batch},
        show_progress_bar=False,
    )
    return {result.task_name: _numbers(result.scores[SPLIT][0]) for result in found.task_results}


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in scores.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def read_samples(spec: str, *, target: str | None, caption: str | None) -> list[Sample]:
    """Those that have a picture and all that was asked for."""
    shards = ShardSet.open(spec)
    found = []
    places = range(len(shards))
    for index in counted(places, f"reading {spec}", total=len(shards), unit="samples"):
        try:
            raw = shards.read(index)
            record = Record(raw.sample_id, values_of(raw.fields))
            image = find_image(raw.fields)
        except (BadSample, DamagedSample):
            continue
        name = None if target is None else class_of(record, target)
        texts = [] if caption is None else texts_of(record, caption)
        if (target is None or name is not None) and (caption is None or texts):
            picture = class_of(record, "pix") or hashlib.sha256(image).hexdigest()
            found.append(Sample(picture, image, name, texts))
    if not found:
        keys = " and ".join(repr(key) for key in (target, caption) if key is not None)
        raise DataError(f"no sample of {spec} has a picture and {keys}; name keys of its json")
    return found


def zero_shot_task(samples: Sequence[Sample], *, template: str) -> Any:
    """Every picture against all class names, each in the template."""
    if "{}" not in template:
        raise ConfigError(f"template {template!r} has no {{}} for the class name")
    names = sorted({str(sample.name) for sample in samples})
    prompts = [template.replace("{}", name) for name in names]
    datasets = needed("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    rows = {
        "image": [{"bytes": sample.image, "path": None} for sample in samples],
        "label": [names.index(str(sample.name)) for sample in samples],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    return _task(
        "AbsTaskZeroShotClassification",
        _about("OwnZeroShot", "ZeroShotClassification", "i2t", "accuracy"),
        {SPLIT: table},
        get_candidate_labels=lambda self: prompts,
    )


def retrieval_tasks(samples: Sequence[Sample]) -> list[Any]:
    """Texts for pictures and pictures for texts; equal ones count once, and all pairs are right."""
    datasets = needed("datasets")
    pictures = {sample.picture: sample.image for sample in samples}
    texts = {text: f"text-{n}" for n, text in enumerate(dict.fromkeys(_all_texts(samples)))}
    of_pictures = datasets.Dataset.from_dict(
        {
            "id": list(pictures),
            "modality": ["image"] * len(pictures),
            "image": [{"bytes": image, "path": None} for image in pictures.values()],
        },
        features=datasets.Features(
            id=datasets.Value("string"), modality=datasets.Value("string"), image=datasets.Image()
        ),
    )
    of_texts = datasets.Dataset.from_dict(
        {"id": list(texts.values()), "modality": ["text"] * len(texts), "text": list(texts)}
    )
    pairs = {(sample.picture, texts[text]) for sample in samples for text in sample.texts}
    right: tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]] = ({}, {})
    for picture, text in sorted(pairs):
        right[0].setdefault(picture, {})[text] = 1
        right[1].setdefault(text, {})[picture] = 1
    return [
        _task(
            "AbsTaskRetrieval",
            _about(f"Own{name}Retrieval", "Any2AnyRetrieval", way, "recall_at_1"),
            {
                "default": {
                    SPLIT: {
                        "queries": queries,
                        "corpus": corpus,
                        "relevant_docs": answers,
                        "top_ranked": None,
                    }
                }
            },
        )
        for name, way, queries, corpus, answers in (
            ("ImageToText", "i2t", of_pictures, of_texts, right[0]),
            ("TextToImage", "t2i", of_texts, of_pictures, right[1]),
        )
    ]


def _all_texts(samples: Sequence[Sample]) -> list[str]:
    return [text for sample in samples for text in sample.texts]


def _task(kind: str, about: Any, dataset: Any, **more: Any) -> Any:
    """A task of this kind that has its data already; it is never fetched."""

    def load_data(self: Any, *_: Any, **__: Any) -> None:
        self.dataset, self.data_loaded = dataset, True

    parent = getattr(needed("mteb.abstasks"), kind)
    made = type(about.name, (parent,), {"metadata": about, "load_data": load_data, **more})
    return made()


def _about(name: str, kind: str, way: str, main_score: str) -> Any:
    metadata = needed("mteb.abstasks.task_metadata")
    return metadata.TaskMetadata(
        name=name,
        description="Of shards of one's own.",
        dataset={"path": "shards", "revision": "local"},
        type=kind,
        category=way,
        modalities=["text", "image"],
        eval_splits=[SPLIT],
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )


def needed(module: str) -> Any:
    """The module; ConfigError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"this needs packages: pip install {PACKAGES} ({error})") from error
