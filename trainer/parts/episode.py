"""What one episode fixes: cluster labels by sample id, and the prototype tables made from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.comm import Comm
from trainer.data.labels import ClusterLabels
from trainer.losses.constant_prototypes import PrototypeTable
from trainer.recipe import every_nth


class EpisodeTables:
    """A Part without parameters: tables and labels are constants until the next episode.

    Tables live as row shards; labels (12 bytes a sample) and centroids are on every rank. The
    state speaks global rows, so an episode goes on with another number of ranks.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.tables: dict[str, PrototypeTable] = {}
        """By prototype term."""
        self.labels: dict[str, ClusterLabels] = {}
        """By the space that was clustered."""
        self.centroids: dict[str, Tensor] = {}
        """By the space that was clustered: [K, dim], the next episode's start."""

    def gradients_finite(self) -> None:
        """There are none: prototypes are not updated within an episode."""

    def after_step(self, step: int, *, applied: bool, learning_rate_factor: float) -> None:
        pass

    def clear(self) -> None:
        """Forget tables and labels; centroids stay as a start for the next clustering."""
        self.tables, self.labels = {}, {}

    def state_share(self) -> dict[str, Tensor]:
        return every_nth(self.state_dict(), self.comm)

    def state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, table in self.tables.items():
            state[f"table/{name}/prototypes"] = self.comm.gather_rows(table.prototypes)
            state[f"table/{name}/targets"] = self.comm.gather_rows(table.targets)
            state[f"table/{name}/valid"] = self.comm.gather_rows(table.valid.to(torch.uint8))
        for name, labels in self.labels.items():
            state[f"labels/{name}/ids"] = labels.ids
            state[f"labels/{name}/labels"] = labels.labels
        for name, centroids in self.centroids.items():
            state[f"centroids/{name}"] = centroids
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        state = {name: value.to(self.comm.device) for name, value in state.items()}
        for name in _names(state, "table"):
            rows = {key: state[f"table/{name}/{key}"] for key in ("prototypes", "targets", "valid")}
            count = rows["valid"].shape[0]
            first, last = self.comm.row_range(count)
            self.tables[name] = PrototypeTable(
                prototypes=rows["prototypes"][first:last],
                targets=rows["targets"][first:last],
                valid=rows["valid"][first:last].bool(),
                num_prototypes=count,
            )
        for name in _names(state, "labels"):
            self.labels[name] = ClusterLabels(
                state[f"labels/{name}/ids"], state[f"labels/{name}/labels"]
            )
        prefix = "centroids/"
        self.centroids = {
            name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)
        }


def _names(state: Mapping[str, Tensor], kind: str) -> list[str]:
    """The middle of all keys `kind/<name>/<field>`; a name may contain slashes itself."""
    keys = [key for key in state if key.startswith(f"{kind}/")]
    return list(dict.fromkeys(key[len(kind) + 1 :].rpartition("/")[0] for key in keys))
