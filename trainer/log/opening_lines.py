"""What a run is about to do, in a few lines: the first thing that a user reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from trainer.config import RunConfig
from trainer.data.stream import Stream
from trainer.settings.section import split_set


def describe(
    config: RunConfig,
    parameters: dict[str, int],
    stream: Stream,
    *,
    world_size: int,
    stage: int,
    notes: Sequence[str] = (),
) -> str:
    """Batch split, sizes and length of the run, one fact a line.

    Bytes are of weights, Adam's two moments and an average of the weights where the run keeps one,
    in float32, which ZeRO divides by the ranks from stage 3 and (all but the weights) stage 1 on;
    activations come on top. `notes` are further lines.
    """
    trained = parameters["trained"]
    weights = 4 * parameters["total"] / (world_size if stage == 3 else 1)
    copies = 2 if config.average is None else 3
    moments = 4 * copies * trained / (world_size if stage >= 1 else 1)
    epochs = config.steps * config.global_batch / max(1, stream.epoch_size)
    parts = ", ".join(
        f"{name} {count / 1e6:.2f} M"
        for name, count in parameters.items()
        if name not in {"total", "trained"} and count > 1000
    )
    kept = "weights and moments" if config.average is None else "weights, moments and average"
    lines = [
        f"{config.recipe.name}: {config.steps} steps of {config.global_batch} samples, "
        f"{epochs:.1f} epochs of {stream.epoch_size}",
        f"global batch {config.global_batch} = {world_size} ranks x "
        f"{stream.num_micro_batches} micro-batches of {stream.micro_batch}",
        f"{parameters['total'] / 1e6:.2f} M parameters ({parts}), "
        f"{trained / 1e6:.2f} M of them trained",
        f"ZeRO-{stage}, gradient checkpointing {'on' if config.gradient_checkpointing else 'off'}: "
        f"{(weights + moments) / 2**20:.0f} MiB of {kept} per rank",
    ]
    return "\n".join([*lines, *_sets(stream), *notes])


def _sets(stream: Stream) -> list[str]:
    """A line with the sets of shards, where they have names: these are part of who a sample is."""
    counts = Counter(split_set(line)[0] for line in stream.shard_lines)
    if not any(counts):
        return []
    return ["sets: " + ", ".join(f"{name or 'unnamed'} {n} shards" for name, n in counts.items())]
