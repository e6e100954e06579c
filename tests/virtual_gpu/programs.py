"""What else than a step of training is tried on a pretended GPU: evaluations, going on, tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from tests.curation.corpus import write_outside
from tests.virtual_gpu.cases import config_of
from trainer import loop
from trainer.cluster.problem import KMeansConfig
from trainer.comm import Comm
from trainer.concepts import Counts
from trainer.config import RunConfig
from trainer.evals import linear_probe
from trainer.programs.cluster import ClusterJob, cluster_store
from trainer.programs.concepts import class_bank
from trainer.programs.embed import open_teacher, project_store
from trainer.programs.workdir import evaluate_workdir
from trainer.teachers.fill import embed
from trainer.teachers.spec import TeacherSpec

EVALUATIONS = ("zero_shot", "long_tail", "retrieval", "knn", "linear_probe", "ood")


def evaluated(folder: Path, spec: str, comm: Comm) -> None:
    """Every evaluation during a run that is stopped once, goes on, and is measured again."""
    here = _measured(folder, spec, comm)
    assert loop.train(here.model_copy(update={"steps": 1, "evals": ()})).finished
    # A strong penalty is soon fitted: each pass of the fit is as the one before.
    with patch.object(linear_probe, "PENALTIES", (1.0,)):
        outcome = loop.train(here)
        assert (outcome.finished, outcome.steps_now) == (True, 1)
        assert list(evaluate_workdir(here.workdir, comm)) == list(EVALUATIONS)


def _measured(folder: Path, spec: str, comm: Comm) -> RunConfig:
    fit, test = (str(folder / "shards" / f"emoji-00000{number}.tar") for number in range(2))
    on = {"data": test, "target": "group"}
    if comm.is_main:
        write_outside(folder / "outside.tar")
    comm.barrier()
    entries = [
        {"name": "zero_shot", **on, "templates": ["{}"]},
        {
            "name": "long_tail",
            **on,
            "templates": ["{}"],
            "concepts": str(_counts(folder, spec, comm)),
        },
        {"name": "retrieval", "data": spec},
        {"name": "knn", **on, "train": fit},
        {"name": "linear_probe", **on, "train": fit},
        {"name": "ood", **on, "train": fit, "outside": {"far": str(folder / "outside.tar")}},
    ]
    said = json.dumps([{"label": entry["name"], **entry} for entry in entries])
    average = "average={}"
    return config_of("clip", folder, spec, comm.world_size, f"evals={said}", average,
                     f"workdir={folder}/evaluated", steps=2)  # fmt: skip


def _counts(folder: Path, spec: str, comm: Comm) -> Path:
    bank = class_bank(spec, "group")
    counts = Counts.none(source="here", languages=["en"], num_concepts=len(bank))
    counts.any_text[:] = 30
    if comm.is_main:
        bank.save(folder / "counts" / "bank.jsonl")
        counts.save(folder / "counts" / "counts.safetensors")
    comm.barrier()
    return folder / "counts"


def embedded(folder: Path, spec: str, comm: Comm) -> None:
    """Vectors of a trained tower, of a language model, and both on fewer components."""
    for name, settings in (
        ("images", TeacherSpec(model=str(folder / "evaluated"), kind="image", batch_images=8)),
        ("states", TeacherSpec(model=str(folder / "lm"), pooling="last")),
    ):
        teacher, out = open_teacher(settings, comm), folder / f"of_{name}"
        embed(spec, out, teacher=teacher, comm=comm, report=lambda _: None)
        project_store(
            *(spec, out, folder / f"few_{name}", 4, comm), dtype="float16", report=lambda _: None
        )


def clustered(folder: Path, spec: str, comm: Comm) -> None:
    """Exact, by cells, over a grid, by inner products, without near-duplicates."""
    ways = {
        "exact": {"start": "parallel"},
        "cells": {"assignment": "two_level", "cells": 3, "start": "hierarchical"},
        "grid": {"grid": 2, "spherical": True},
    }
    for name, way in ways.items():
        kmeans = KMeansConfig(clusters=6, iterations=3, seed=3, **way)
        duplicates = 0.999 if name == "exact" else None
        job = ClusterJob(kmeans=kmeans, per_sample=3, duplicate_cosine=duplicates)
        cluster_store(folder / "of_images", folder / name, job, comm, say=lambda _: None)


PROGRAMS: dict[str, Callable[[Path, str, Comm], None]] = {
    "evaluated": evaluated,
    "embedded": embedded,
    "clustered": clustered,
}
"""In this order: each reads what the one before has left."""
