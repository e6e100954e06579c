"""When a run is saved, and what a full disk means."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.checkpoint.run_state import Place, save_state
from trainer.config import EvalConfig
from trainer.errors import CheckpointError
from trainer.running.built import Run


def save(run: Run, here: Place, due: Sequence[EvalConfig]) -> Place:
    run.log.flush()
    labels = [entry.label for entry in due]
    save_state(
        *(run.checkpoints, run.engine, run.recipe, here, run.config),
        frozen=run.frozen,
        shards=[*run.stream.shard_lines, *run.stream.folder_lines],
        evaluations_due=labels,
        more=run.spikes.state(),
    )
    return here


def save_if_possible(run: Run, here: Place, due: Sequence[EvalConfig]) -> Place | None:
    """On a full disk training goes on; the next save may find room."""
    try:
        return save(run, here, due)
    except CheckpointError as error:
        run.log.event(here.progress, "not saved", why=str(error))
        return None


def save_what_is_not(run: Run, here: Place, due: Sequence[EvalConfig], saved: Place | None) -> None:
    """And wait until it is on disk, beside training or not."""
    try:
        run.checkpoints.finish()
    except CheckpointError:
        saved = None  # what was begun came to nothing
    if here != saved:
        save(run, here, due)
        run.checkpoints.finish()
