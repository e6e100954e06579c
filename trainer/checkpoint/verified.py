"""A checkpoint that is found on disk, checked byte by byte before anybody reads it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from trainer.checkpoint.manifest import Manifest, damage, parse_manifest, read_manifest_bytes
from trainer.checkpoint.restored import Restored, open_checkpoint
from trainer.comm import Comm
from trainer.pulse import PULSE


def verified(
    folder: Path, comm: Comm, reads: Collection[str] | None
) -> tuple[Restored | None, str]:
    """The checkpoint if every file is as its manifest says, else None and why; on all ranks, which
    share the hashing. `reads`: the groups whose files are looked at."""
    text, reason = None, ""
    if comm.is_main:
        try:
            text = read_manifest_bytes(folder).decode()
        except (OSError, ValueError) as error:
            reason = str(error)
    text, reason = comm.broadcast_json([text, reason])
    if text is None:
        return None, reason
    try:
        manifest = _wanted(parse_manifest(text), reads)
        problems = _damages(folder, manifest, comm)
        return (None, "; ".join(problems)) if problems else (open_checkpoint(folder, manifest), "")
    except ValueError as error:
        return None, str(error)


def _wanted(manifest: Manifest, reads: Collection[str] | None) -> Manifest:
    """With the files alone that will be read."""
    if reads is None:
        return manifest
    wanted = {None, *reads}
    files = tuple(entry for entry in manifest.files if entry.group in wanted)
    return manifest.model_copy(update={"files": files})


def _damages(folder: Path, manifest: Manifest, comm: Comm) -> list[str]:
    mine = manifest.files[comm.rank :: comm.world_size]
    found = []
    for entry in mine:
        PULSE.beat()
        found += [problem] if (problem := damage(folder, entry)) else []
    return [problem for part in comm.gather_json(found) for problem in part]
