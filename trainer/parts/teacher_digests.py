"""Which frozen vectors a run trains against, so that it never goes on with others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.comm import Comm
from trainer.errors import CheckpointError
from trainer.recipe import every_nth
from trainer.store import EmbeddingStore
from trainer.store.shard_file import SUFFIX, read_shard_header


class TeacherDigests:
    """A Part without parameters: a digest of every store, compared when a run goes on."""

    def __init__(self, digests: Mapping[str, str], comm: Comm) -> None:
        self.digests, self.comm = dict(digests), comm

    def gradients_finite(self) -> None:
        """There are none."""

    def after_step(self, step: int, *, applied: bool, learning_rate_factor: float) -> None:
        pass

    def state_share(self) -> dict[str, Tensor]:
        state = {
            name: torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)
            for name, digest in self.digests.items()
        }
        return every_nth(state, self.comm)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """A CheckpointError where a store is not the one that the run began with."""
        before = {name: bytes(state[name].tolist()).hex() for name in state}
        for name in sorted(before.keys() | self.digests.keys()):
            found = self.digests.get(name, "none")
            if before.get(name, "none") != found:
                raise CheckpointError(
                    f"the vectors of teacher {name} are not those that this run began with "
                    f"({before.get(name, 'none')[:12]} then, {found[:12]} now); restore that "
                    "store or choose another workdir"
                )


def store_digest(store: EmbeddingStore) -> str:
    """SHA-256 over what the vectors are and the checksums of all files."""
    digest = hashlib.sha256(store.identity.model_dump_json().encode())
    for name in store.header.shards:
        header, _ = read_shard_header(store.folder / f"{name}{SUFFIX}")
        digest.update(f"\n{name} {header.rows} {header.checksum}".encode())
    return digest.hexdigest()
