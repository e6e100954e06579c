"""Checkpoints that are either whole or not there, for any number of ranks.

A save writes into a folder of its own, which gets its final name by one rename after every file is
on disk; so a kill at any moment leaves the checkpoints before it as they were. Reading checks every
byte against the manifest and falls back, loudly, to the checkpoint before. Tensors are safetensors
and everything else is JSON or text: reading one can't run code.

    workdir/checkpoints/step-00000120/manifest.json, manifest.sha256, state.json, run.yaml,
                                      weights-00001-of-00004.safetensors, ...

The folder must be one that all ranks see.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from trainer.addresses import without_secrets
from trainer.checkpoint.generations import free_name, generations, prune
from trainer.checkpoint.manifest import (
    STATE,
    Manifest,
    Share,
    ShareWriter,
    failure_of_copy,
    sync_folder,
    write_manifest,
)
from trainer.checkpoint.restored import Restored
from trainer.checkpoint.room import free_bytes, size_in_words
from trainer.checkpoint.verified import verified
from trainer.comm import Comm
from trainer.errors import CheckpointError
from trainer.pulse import PULSE
from trainer.types import NamedTensors


def _to_stderr(line: str) -> None:
    sys.stderr.write(without_secrets(line) + "\n")


class Checkpointer:
    """Saves into and restores from one folder; every rank calls every method."""

    def __init__(
        self,
        folder: Path,
        comm: Comm,
        *,
        keep: int = 2,
        file_bytes: int = 512 << 20,
        reads: Collection[str] | None = None,
        second: Path | None = None,
    ) -> None:
        """`reads`: the groups that will be read. Of others no byte is checked, and none is there:
        whoever evaluates a model has no use for its moments, two thirds of a checkpoint.

        `second`: a folder that holds a copy of each checkpoint, as whole as the first and read
        where that is damaged or gone."""
        if keep < 2:
            raise ValueError("keep at least two: the one before is the way back from damage")
        self._folder = folder
        self._comm = comm
        self._keep = keep
        self._file_bytes = file_bytes
        self._reads = reads
        self._refused: set[str] = set()
        self._second = (
            None if second is None else Checkpointer(second, comm, keep=keep, reads=reads)
        )

    def beside(self) -> Checkpointer:
        """This one for another thread: its collectives are of a group of their own."""
        return self._over(self._comm.beside())

    def _over(self, comm: Comm) -> Checkpointer:
        other = copy.copy(self)
        other._comm = comm
        other._second = self._second and self._second._over(comm)
        return other

    # -- saving ---------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tensors: Mapping[str, NamedTensors],
        state: Mapping[str, Any],
        texts: Mapping[str, str],
    ) -> Path:
        """Write a checkpoint and return its folder, once it is safe on disk.

        `tensors` is this rank's share by group: each name is on one rank only (ValueError), the
        groups come in the same order on all. `state` (JSON) and `texts` are written by rank 0.
        CheckpointError on all ranks if one of them can't write; what was there before stays. So it
        is where the second copy can't be written, which is then all that is missing.
        """
        state_text = json.dumps(state, allow_nan=False)
        with PULSE.phase("save"):
            return self._saved(step, tensors, state_text, texts)

    def _saved(
        self,
        step: int,
        tensors: Mapping[str, NamedTensors],
        state_text: str,
        texts: Mapping[str, str],
    ) -> Path:
        temporary = self._begin(step)
        writer = self._writer(temporary)
        with PULSE.phase("save"):  # this rank's own share: who is not through is behind
            for group, values in tensors.items():
                writer.group(group, values)
            if self._comm.is_main:
                for name, text in {STATE: state_text, **texts}.items():
                    writer.text(name, text)
        shares = [
            Share.model_validate(share)
            for share in self._comm.gather_json(writer.share.model_dump(mode="json"))
        ]
        self._check(step, temporary, shares)
        folder = self._commit(step, temporary, shares)
        if self._comm.is_main:
            prune(self._folder, folder, keep=self._keep, refused=self._refused)
        self._comm.barrier()
        if self._second is not None:
            self._second._copy(folder, step, shares)
        return folder

    def _copy(self, folder: Path, step: int, shares: Sequence[Share]) -> None:
        """Each rank copies its files, and reads both ends of every byte: what was written is hashed
        as it is read, and what is read back must have that hash too."""
        try:
            temporary = self._begin(step)
            failures = self._comm.gather_json(
                failure_of_copy(shares[self._comm.rank].files, folder, temporary)
            )
            if told := [f"rank {r}: {failure}" for r, failure in enumerate(failures) if failure]:
                self._abandon(temporary)
                self._give_up(step, told, needed=sum(share.size for share in shares))
            copied = self._commit(step, temporary, shares)
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder} is saved, but its second copy is not: {error}"
            ) from error
        if self._comm.is_main:
            prune(self._folder, copied, keep=self._keep, refused=self._refused)
        self._comm.barrier()

    def _writer(self, folder: Path) -> ShareWriter:
        comm = self._comm
        return ShareWriter(
            folder, rank=comm.rank, world_size=comm.world_size, file_bytes=self._file_bytes
        )

    def _begin(self, step: int) -> Path:
        """Clear what dead runs left behind and make the folder to write into."""
        name, failure = f".saving-step-{step:08d}-{secrets.token_hex(4)}", ""
        if self._comm.is_main:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                for stale in [*self._folder.glob(".saving-*"), *self._folder.glob(".old-*")]:
                    shutil.rmtree(stale, ignore_errors=True)
                (self._folder / name).mkdir()
            except OSError as error:
                failure = str(error)
        name, failure = self._agreed(name, failure)
        if failure:
            raise CheckpointError(f"can't save step {step}: {failure}")
        return self._folder / name

    def _agreed(self, name: str, failure: str) -> tuple[str, str]:
        """What rank 0 says of a step that it took alone."""
        name, failure = self._comm.broadcast_json([name, failure])
        return name, failure

    def _check(self, step: int, temporary: Path, shares: Sequence[Share]) -> None:
        counts = Counter(
            f"{entry.group}/{name}" for s in shares for entry in s.files for name in entry.tensors
        )
        doubled = [name for s in shares for name in s.doubled]
        doubled += [name for name, count in counts.items() if count > 1]
        failures = [f"rank {r}: {s.failure}" for r, s in enumerate(shares) if s.failure is not None]
        if doubled or failures:
            self._abandon(temporary)
        if doubled:
            raise ValueError(f"tensor {doubled[0]} was given to the checkpoint twice")
        if failures:
            self._give_up(step, failures, needed=sum(share.size for share in shares))

    def _abandon(self, temporary: Path) -> None:
        if self._comm.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        self._comm.barrier()

    def _give_up(self, step: int, failures: Sequence[str], *, needed: int) -> NoReturn:
        free = self._comm.broadcast_json(free_bytes(self._folder))
        raise CheckpointError(
            f"can't save step {step}: {'; '.join(failures)}; it needs "
            f"{size_in_words(needed)} and {size_in_words(free)} are free in {self._folder}; the "
            "checkpoints before it are untouched"
        )

    def _commit(self, step: int, temporary: Path, shares: Sequence[Share]) -> Path:
        """Rank 0 writes the manifest and gives the folder its name: from here on it exists."""
        files = tuple(entry for share in shares for entry in share.files)
        manifest = Manifest(step=step, world_size=self._comm.world_size, files=files)
        name = failure = ""
        if self._comm.is_main:
            try:
                name = free_name(self._folder, step)
                write_manifest(temporary, manifest)
                os.replace(temporary, self._folder / name)
                sync_folder(self._folder)
            except OSError as error:
                failure = f"rank 0: {error}"
        name, failure = self._agreed(name, failure)
        if failure:
            self._abandon(temporary)
            self._give_up(step, [failure], needed=sum(share.size for share in shares))
        return self._folder / name

    # -- restoring ------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Of the checkpoints that may be gone on from, whether they are damaged or not."""
        found = [
            each.step for each in generations(self._folder) if each.folder.name not in self._refused
        ]
        return list(self._comm.broadcast_json(found))

    def latest(
        self,
        *,
        warn: Callable[[str], None] = _to_stderr,
        passed_over: Callable[[Restored], bool] = lambda restored: False,
    ) -> Restored | None:
        """The newest checkpoint that is undamaged; None where there has never been one.

        The ranks share the hashing and agree. Each refused checkpoint is told to `warn` on rank 0;
        CheckpointError if there are some and none can be used. One that is `passed_over` counts
        as if it were not there.
        """
        with PULSE.phase("restore"):
            return self._latest(warn, passed_over)

    def named(self, name: str) -> Restored:
        """The checkpoint in the folder of that name; CheckpointError on all ranks if it is damaged,
        or none."""
        with PULSE.phase("restore"):
            restored, reason = verified(self._folder / name, self._comm, self._reads)
        if restored is None:
            raise CheckpointError(f"{self._folder / name} is no sound checkpoint: {reason}")
        return restored

    def _latest(
        self, warn: Callable[[str], None], passed_over: Callable[[Restored], bool]
    ) -> Restored | None:
        second = generations(self._second._folder) if self._second else []
        found = [*generations(self._folder), *second]
        newest = sorted(found, key=lambda g: (g[:2], g.folder.parent == self._folder), reverse=True)
        paths = self._comm.broadcast_json([str(each.folder) for each in newest])
        reasons: list[str] = []
        for path in map(Path, paths):
            restored, reason = verified(path, self._comm, self._reads)
            if restored is not None and not passed_over(restored):
                return restored
            if path.parent == self._folder:
                self._refused.add(path.name)
            elif self._second is not None:
                self._second._refused.add(path.name)
            if restored is not None:
                continue
            reasons.append(f"{path.name}: {reason}")
            if self._comm.is_main:
                warn(f"checkpoint {path} is damaged and not used: {reason}")
        if reasons:
            raise CheckpointError(
                f"none of the {len(reasons)} checkpoints in {self._folder} can be used "
                f"({'; '.join(reasons)}); restore a copy, or move the folder away to start anew"
            )
        return None
