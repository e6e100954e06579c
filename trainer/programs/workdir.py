"""What a run left in its workdir: the newest weights as a model, and the logged results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.restored import Restored
from trainer.checkpoint.run_state import Beneath, frozen_digest
from trainer.comm import Comm
from trainer.config import RunConfig, Weights, parse_run
from trainer.errors import CheckpointError, ConfigError
from trainer.evals import by_weights, evaluate_all
from trainer.export.native import load_trained
from trainer.models.model import Model
from trainer.parts.stored_features import FEATURES
from trainer.parts.teacher_digests import TeacherDigests
from trainer.recipe import Encode, build_model
from trainer.run import AVERAGE, eval_context, stored_of, tokenizer_of
from trainer.types import Batch, Features

RUN_KEYS = frozenset({"step", "samples", "skipped", "after_save"})
"""Of an event's record: where the run was, not what the evaluation found."""


class Trained(NamedTuple):
    """A run's newest checkpoint, ready to be used. Whole on every rank."""

    run: RunConfig
    model: Model
    tokenizer: PreTrainedTokenizerFast | None
    """None where the model reads no text."""
    restored: Restored


def open_workdir(
    workdir: Path,
    comm: Comm,
    overrides: Sequence[str] = (),
    *,
    weights: Weights = "trained",
) -> Trained:
    """Rebuild the model of the newest good checkpoint, in evaluation mode.

    `overrides` are dotted `key=value`, for folders that have moved since. CheckpointError where
    the frozen weights, which no checkpoint holds, are not those that the run was trained with.
    """
    groups = ("weights", "parts")
    restored = Checkpointer(workdir / "checkpoints", comm, reads=groups).latest()
    if restored is None:
        raise CheckpointError(f"{workdir}/checkpoints holds no checkpoint; train first")
    source = f"{restored.folder}/run.yaml"
    places = [f"workdir={workdir}", *overrides]
    run = parse_run(restored.texts["run.yaml"], places, source=source)
    try:
        tokenizer = tokenizer_of(run, comm)
        shape = restored.state.get("shape")
        model = build_model(run.recipe, tokenizer, comm, seed=run.seed, shape=shape)
    except ConfigError as error:
        raise _told_of_moved_folders(error, run) from error
    if restored.state["frozen_weights"] != frozen_digest(model):
        raise CheckpointError(
            f"the frozen weights in {' and '.join(_folders(run).values()) or 'the model'} are not "
            f"those that {workdir} was trained with; restore the model they came from, and give "
            "its place if that is another one"
        )
    _refuse_other_features(run, restored, comm)
    load_trained(model, weights_of(restored, run, weights))
    return Trained(run, model.to(comm.device).eval(), tokenizer, restored)


def _refuse_other_features(run: RunConfig, restored: Restored, comm: Comm) -> None:
    """A CheckpointError where the stores that are read in place of images are of another encoder
    than those that were trained on."""
    stored = stored_of(run)
    if stored is None:
        return
    before = Beneath(restored.lazily("parts"), f"{FEATURES}/").get(FEATURES)
    digests = TeacherDigests({FEATURES: stored.check(comm, views=1)}, comm)
    digests.load_state_dict({} if before is None else {FEATURES: before})


def weights_of(restored: Restored, run: RunConfig, weights: Weights) -> dict[str, Tensor]:
    """All that a checkpoint holds of the model; ConfigError where it holds no average."""
    found = dict(restored.tensors("weights"))
    if weights == "trained":
        return found
    if run.average is None:
        raise ConfigError(
            f"the run in {run.workdir} kept no average of its weights; train with `average: {{}}` "
            "in its run file, or ask for the trained ones"
        )
    averages = Beneath(restored.lazily("parts"), f"{AVERAGE}/")
    return {name: averages.get(name, value) for name, value in found.items()}


def _folders(run: RunConfig) -> dict[str, str]:
    """What the model of a run is loaded from, by key."""
    model: Any = run.recipe.model
    found = {
        "recipe.model.tokenizer": getattr(model, "tokenizer", None),
        **{
            f"recipe.model.{tower}.path": getattr(getattr(model, tower, None), "path", None)
            for tower in ("image", "text")
        },
    }
    return {key: path for key, path in found.items() if path is not None}


def _told_of_moved_folders(error: ConfigError, run: RunConfig) -> ConfigError | CheckpointError:
    """The error itself, or that a folder is not where the run found it."""
    gone = {key: path for key, path in _folders(run).items() if not Path(path).exists()}
    if not gone:
        return error
    key, path = next(iter(gone.items()))
    return CheckpointError(
        f"{key} of the run is {path}, which is not there (now in {Path.cwd()}); if it has moved, "
        f"add its place to the command: {key}=FOLDER"
    )


def encoder(model: Model) -> Encode:
    @torch.no_grad()
    def encode(batch: Batch) -> Features:
        features: Features = model(batch)
        return features

    return encode


def evaluate_workdir(
    workdir: Path, comm: Comm, overrides: Sequence[str] = (), *, weights: Weights | None = None
) -> dict[str, dict[str, float]]:
    """The run's evaluations on its newest weights, spread over the ranks.

    Of the weights that each evaluation names, or all of `weights` where they are given.
    """
    trained = open_workdir(workdir, comm, overrides)
    context = eval_context(trained.run, comm, trained.tokenizer)
    entries = trained.run.evals
    if weights is not None:
        entries = tuple(entry.model_copy(update={"weights": weights}) for entry in entries)
    figures: dict[str, dict[str, float]] = {}
    for kind, some in by_weights(entries):
        load_trained(trained.model, weights_of(trained.restored, trained.run, kind))
        figures |= evaluate_all(some, encoder(trained.model), context)
    return {entry.label: figures[entry.label] for entry in entries}


def logged_results(workdir: Path) -> dict[str, Mapping[str, float]]:
    """The last figures of each evaluation that training wrote, by label."""
    restored = Checkpointer(workdir / "checkpoints", Comm.solo(), reads=()).latest()
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
