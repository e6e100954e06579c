"""What is measured and drawn on the way. A failure there is an event, for training goes on."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.checkpoint.restored import Restored
from trainer.checkpoint.run_state import (
    place_of,
)
from trainer.comm import Comm
from trainer.config import EvalConfig, RunConfig
from trainer.data.labels import ClusterLabels
from trainer.evals import EvalContext, Result, by_weights, evaluate_each
from trainer.log.metrics import evaluated
from trainer.pictures.run import training_pictures
from trainer.run import (
    eval_context,
)
from trainer.running.built import Run
from trainer.types import Progress


def due_looks(run: Run, before: Progress, progress: Progress) -> list[EvalConfig]:
    """The evaluations of this step. The end of a run is always evaluated."""
    ends = progress.step == run.config.steps
    return [
        entry
        for entry in run.config.evals
        if run.clock.due(entry.label, entry.every, before, progress) or ends
    ]


def look(run: Run, progress: Progress, due: Sequence[EvalConfig]) -> list[str]:
    """Evaluate and draw what is due. Returns what failed: an event, for training goes on."""
    context = eval_context(run.config, run.comm, run.tokenizer, run.check)
    failed, groups = [], run.recipe.shown_groups()
    for weights, entries in by_weights(due):
        with run.running_on(weights):
            found = []
            for result in evaluate_each(entries, run.encode, context):
                if _logged(run, progress, result):
                    found.append(result.config)
                else:
                    failed.append(f"evaluation {result.config.label} failed: {result.failure}")
            _draw(run, progress, found, context, groups)
        groups = None if found else groups  # are drawn once
    return failed


def _logged(run: Run, progress: Progress, result: Result) -> bool:
    """Whether an evaluation found something; what, or why it did not, is in the log."""
    label = result.config.label
    if result.failure is None:
        run.log.evaluation(progress, label, result.figures)
    else:
        run.log.event(progress, "not evaluated", evaluation=label, why=result.failure)
    return result.failure is None


def _draw(
    run: Run,
    progress: Progress,
    found: Sequence[EvalConfig],
    context: EvalContext,
    groups: ClusterLabels | None,
) -> None:
    for name, picture in training_pictures(groups, run.config, found, run.encode, context):
        if isinstance(picture, str):
            run.log.event(progress, "not drawn", picture=name, why=picture)
        else:
            run.log.image(progress, name, picture)


def owed_looks(config: RunConfig, restored: Restored, comm: Comm) -> list[EvalConfig]:
    """Evaluations of the restored step that the run before did not come to."""
    done = sorted(evaluated(config.workdir, place_of(restored).progress)) if comm.is_main else []
    done = comm.broadcast_json(done)
    was_due = restored.state.get("evaluations_due", [])
    return [
        entry
        for entry in config.evals
        if (entry.label in was_due or restored.step >= config.steps) and entry.label not in done
    ]
