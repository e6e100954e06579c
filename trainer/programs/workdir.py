"""What a run left in its workdir: the newest weights as a model, and the logged results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.restored import Restored
from trainer.comm import Comm
from trainer.config import RunConfig, parse_run
from trainer.errors import CheckpointError
from trainer.evals import evaluate_all
from trainer.export.transformers_folder import Rebuilt, rebuild_model
from trainer.models.model import Model
from trainer.recipe import Encode
from trainer.run import eval_context, tokenizer_of
from trainer.types import Batch, Features

RUN_KEYS = frozenset({"step", "samples", "skipped", "after_save"})
"""Of an event's record: where the run was, not what the evaluation found."""


class Trained(NamedTuple):
    """A run's newest checkpoint, ready to be used. Whole on every rank."""

    run: RunConfig
    model: Rebuilt
    tokenizer: PreTrainedTokenizerFast | None
    """None where the model reads no text."""
    restored: Restored


def open_workdir(workdir: Path, comm: Comm) -> Trained:
    """Rebuild the model of the newest good checkpoint, in evaluation mode."""
    restored = Checkpointer(workdir / "checkpoints", comm).latest()
    if restored is None:
        raise CheckpointError(f"{workdir}/checkpoints holds no checkpoint; train first")
    source = f"{restored.folder}/run.yaml"
    run = parse_run(restored.texts["run.yaml"], [f"workdir={workdir}"], source=source)
    tokenizer = tokenizer_of(run, comm)
    model = rebuild_model(run, dict(restored.tensors("weights")), tokenizer)
    return Trained(run, model.to(comm.device), tokenizer, restored)


def encoder(model: Model) -> Encode:
    @torch.no_grad()
    def encode(batch: Batch) -> Features:
        features: Features = model(batch)
        return features

    return encode


def evaluate_workdir(workdir: Path, comm: Comm) -> dict[str, dict[str, float]]:
    """The run's evaluations on its newest weights, spread over the ranks."""
    trained = open_workdir(workdir, comm)
    context = eval_context(trained.run, comm, trained.tokenizer)
    return evaluate_all(trained.run.evals, encoder(trained.model), context)


def logged_results(workdir: Path) -> dict[str, Mapping[str, float]]:
    """The last figures of each evaluation that training wrote, by label."""
    restored = Checkpointer(workdir / "checkpoints", Comm.solo()).latest()
    if restored is None:
        raise CheckpointError(f"{workdir}/checkpoints holds no checkpoint; train first")
    labels = [entry.label for entry in parse_run(restored.texts["run.yaml"]).evals]
    latest: dict[str, Mapping[str, float]] = {}
    for line in (workdir / "events.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] in labels:
            latest[record["event"]] = {
                "samples" if key == "num_samples" else key: float(value)
                for key, value in record.items()
                if isinstance(value, float | int) and key not in RUN_KEYS
            }
    return {label: latest[label] for label in labels if label in latest}
