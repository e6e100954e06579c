"""A run's whole state, out of its objects into a checkpoint and back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trainer.addresses import all_without_secrets, without_secrets
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.restored import Restored
from trainer.comm import Comm
from trainer.config import RunConfig, dump_run, parse_run
from trainer.engine.zero import Engine, persistent_buffers
from trainer.errors import CheckpointError
from trainer.recipe import ChangesShape, Recipe
from trainer.types import Batch, NamedTensors, Progress

# What may change between two starts of the same run. Anything else would continue another run
# under the old one's name.
FREE_TO_CHANGE = frozenset(
    {
        "workdir",
        "steps",
        "begin_from",
        "micro_batch",
        "deepspeed",
        "gradient_checkpointing",
        "compile_blocks",
        "evals",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "save_beside",
        "second_copy",
        "max_skipped_steps",
        "spikes",
        "comm_timeout_seconds",
        "hang_seconds",
    }
)
SHARDS = "shards.txt"
FREE_BEFORE_IT_BEGINS = ("cooldown", "cooldown_steps")
"""Keys of `optim` that change nothing until the rate falls."""
FREE_DATA = frozenset({"workers", "cache_mib", "bad_sample_budget"})


class Saver(Protocol):
    """What writes a checkpoint, at once or beside training."""

    def save(
        self,
        step: int,
        tensors: Mapping[str, NamedTensors],
        state: Mapping[str, Any],
        texts: Mapping[str, str],
    ) -> object: ...


class Place(NamedTuple):
    """Where a run is: between two steps, or between the beginning of a phase and its first step."""

    progress: Progress
    phase_begun: bool = False


def place_of(restored: Restored) -> Place:
    state = restored.state
    return Place(Progress(**state["progress"]), state.get("phase_begun", False))


def branched_from(config: RunConfig, comm: Comm) -> Restored | None:
    """The checkpoint of another workdir that the run begins from, if it does.

    CheckpointError where it can't be read, or leaves the run no step to take.
    """
    if config.begin_from is None:
        return None
    folder = config.begin_from.absolute()
    restored = Checkpointer(folder.parent, comm).named(folder.name)
    if restored.step >= config.steps:
        raise CheckpointError(
            f"begin_from: {folder} is at step {restored.step}, and the run ends at step "
            f"{config.steps}; give more steps or an earlier checkpoint"
        )
    return restored


def save_state(
    checkpoints: Saver,
    engine: Engine,
    recipe: Recipe,
    here: Place,
    config: RunConfig,
    *,
    frozen: str,
    shards: Sequence[str] = (),
    evaluations_due: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write weights, moments, parts and progress; every rank writes a share of each.

    `shards` tell those that the run reads from others, wherever they lie. Evaluations come after
    the save; whoever goes on from it does those that are due and have left no line. `more` is put
    beside the progress.
    """
    comm = engine.comm
    tensors: dict[str, NamedTensors] = {
        "weights": engine.weights_share(),
        "moments": engine.moments_share(),
        "parts": _parts_share(recipe),
        "random": {f"rank-{comm.rank}": torch.get_rng_state()},
    }
    state = {
        "progress": asdict(here.progress),
        "phase_begun": here.phase_begun,
        "world_size": comm.world_size,
        "frozen_weights": frozen,
        "evaluations_due": list(evaluations_due),
        **(more or {}),
    }
    if isinstance(recipe, ChangesShape) and (shape := recipe.shape()) is not None:
        state["shape"] = shape
    texts = {"run.yaml": dump_run(config, secrets=False)}
    if shards:
        texts[SHARDS] = "".join(f"{line}\n" for line in shards)
    checkpoints.save(here.progress.step, tensors, state, texts)


def shards_of(restored: Restored | None) -> list[str] | None:
    """What the shards of a checkpoint's run are known by; None where it does not say."""
    text = restored.texts.get(SHARDS) if restored else None
    return None if text is None else text.split("\n")[:-1]


def load_weights(restored: Restored, model: nn.Module, config: RunConfig, *, frozen: str) -> None:
    """Put a checkpoint's weights into a model that no engine has sharded yet."""
    old = parse_run(restored.texts["run.yaml"], source="run.yaml")
    refuse_another_run(old, config, restored, same_shards=shards_of(restored) is not None)
    if restored.state["frozen_weights"] != frozen:
        raise CheckpointError(
            "the frozen weights are not those of the checkpoint; restore the model they came from "
            "or start in another workdir"
        )
    weights = restored.lazily("weights")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    expected = trained | set(persistent_buffers(model))
    if differing := sorted(expected ^ set(weights)):
        raise CheckpointError(
            f"{len(differing)} tensors stand on one side only, as {differing[0]}; "
            "the checkpoint is of another model"
        )
    places = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in expected:
            if (found := weights[name]).shape != places[name].shape:
                raise CheckpointError(
                    f"{name} has the shape {list(found.shape)} in the checkpoint and "
                    f"{list(places[name].shape)} here; the checkpoint is of another model"
                )
            if places[name].dtype == found.dtype:
                places[name].copy_(found)
            elif not restored.lazily("moments"):
                places[name].data = found
            # Else it waits in the precision of its file: `Engine.restore` writes each rank's part.


def load_rest(restored: Restored, engine: Engine, recipe: Recipe, batch: Batch) -> None:
    """Moments, masters, parts and random state."""
    moments = restored.lazily("moments")
    if moments:
        engine.restore(restored.lazily("weights"), moments, restored.step, batch)
    _load_parts(restored, recipe)
    if restored.state["world_size"] == engine.comm.world_size:
        states = dict(restored.tensors("random"))
        torch.set_rng_state(states[f"rank-{engine.comm.rank}"])


@contextmanager
def undone_unless_done(buffers: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it buffers and random numbers may move; what ends it early takes them back.

    Weights, moments and parts change only at the end of a step or phase, when nothing stops it.
    """
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    random = torch.get_rng_state()
    try:
        yield
    except BaseException:
        for name, value in before.items():
            buffers[name].copy_(value)
        torch.set_rng_state(random)
        raise


def refuse_another_run(
    old: RunConfig, new: RunConfig, restored: Restored | None = None, *, same_shards: bool = False
) -> None:
    """A CheckpointError that lists what differs, if it would make another run of this one.

    Where the training data are known to be the same shards, they may be listed in another way. A
    cool-down may be another one at a step before both begin.
    """
    before, after = _comparable(old), _comparable(new)
    differing = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    if same_shards:
        differing.discard("data.train")
    if restored is not None and restored.step <= min(map(_full_rate_ends, (old, new))):
        differing -= {f"optim.{key}" for key in FREE_BEFORE_IT_BEGINS}
    if differing:
        lines = ", ".join(f"{k}: {before.get(k)} -> {after.get(k)}" for k in sorted(differing))
        place = new.workdir if restored is None else restored.folder
        raise CheckpointError(
            f"the checkpoint in {place} is of another run ({lines}); "
            "set these back or choose another workdir"
        )


def changed_settings(restored: Restored, new: RunConfig) -> dict[str, str]:
    """What is free to change and was, as `before -> after` by key, but for where a run lies."""
    old = parse_run(restored.texts["run.yaml"], source="run.yaml")
    before, after = (_flat(config.model_dump(mode="json")) for config in (old, new))
    differing = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    told = sorted(differing - {"workdir", "begin_from", "data.train"})
    return {k: without_secrets(f"{before.get(k)} -> {after.get(k)}") for k in told}


def _full_rate_ends(config: RunConfig) -> int:
    """The step at which a cool-down begins; the last one where there is none."""
    return config.steps - config.optim.cooldown_steps


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 over the frozen weights, which checkpoints do not hold; '' where all are trained.

    To be called before an engine shards the model.
    """
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    digest = hashlib.sha256()
    for name, parameter in frozen:
        digest.update(name.encode())
        values = parameter.detach().cpu()
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.float()  # what it will be, wherever it waits
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest() if frozen else ""


def _comparable(config: RunConfig) -> dict[str, Any]:
    values = all_without_secrets(config.model_dump(mode="json", exclude=set(FREE_TO_CHANGE)))
    values["data"] = {k: v for k, v in values["data"].items() if k not in FREE_DATA}
    return _flat(values)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _parts_share(recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    for part, owner in recipe.parts.items():
        share = owner.state_share()
        for name, value in share.items() if isinstance(share, Mapping) else share:
            yield f"{part}/{name}", value


def _load_parts(restored: Restored, recipe: Recipe) -> None:
    stored = restored.lazily("parts")
    for part, owner in recipe.parts.items():
        owner.load_state_dict(Beneath(stored, f"{part}/"))


class Beneath(Mapping[str, Tensor]):
    """The tensors of a mapping whose names begin with a prefix, by what follows it."""

    def __init__(self, whole: Mapping[str, Tensor], prefix: str) -> None:
        self._whole = whole
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._whole[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (n.removeprefix(self._prefix) for n in self._whole if n.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
