"""What one episode fixes: cluster labels by sample id, and the prototype tables made from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.cluster.kmeans import KMeansResult
from trainer.comm import Comm
from trainer.data.labels import ClusterLabels
from trainer.losses.constant_prototypes import PrototypeTable
from trainer.parts.back_translation import TableOptions, Temperatures, episode_table, own_rows
from trainer.parts.episodes import Extracted
from trainer.parts.teacher import Student, TeacherGroups
from trainer.recipe import every_nth

OTHER: Mapping[Student, Student] = {"image": "text", "text": "image"}


class Term(NamedTuple):
    """Features of one modality against groups that were found in a space: a term of the loss."""

    student: Student
    space: str
    """The other modality's, or a teacher's."""

    @property
    def name(self) -> str:
        return f"{self.student}_from_{self.space}"

    @classmethod
    def named(cls, name: str) -> Term:
        """As a checkpoint has written it."""
        student, _, space = name.partition("_from_")
        return cls("image" if student == "image" else "text", space)


class EpisodeTables:
    """A Part without parameters: tables and labels are constants until the next episode.

    Tables live as row shards; labels (12 bytes a sample) and centroids are on every rank. The
    state speaks global rows, so an episode goes on with another number of ranks.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.tables: dict[Term, PrototypeTable] = {}
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

    def keep(self, extracted: Extracted, clustered: Mapping[Student, KMeansResult]) -> None:
        """The groups that were found in each modality, and nothing of the episode before."""
        self.clear()
        for space, result in clustered.items():
            self.centroids[space] = result.centroids
            self.labels[space] = ClusterLabels.gather(extracted.ids, result.labels, self.comm)

    def add_pair(
        self,
        extracted: Extracted,
        clustered: Mapping[Student, KMeansResult],
        options: TableOptions,
        *,
        temperatures: Temperatures,
    ) -> None:
        """Images learn from the groups of texts, and texts from those of images."""
        for student, space in OTHER.items():
            result = clustered[space]
            self.tables[Term(student, space)] = episode_table(
                *(extracted.of(student), result.labels, own_rows(result.centroids, self.comm)),
                *(options, self.comm),
                temperature=temperatures[space],
            )

    def add_teachers(
        self, extracted: Extracted, teachers: Mapping[str, TeacherGroups], options: TableOptions
    ) -> None:
        """What students have in the groups of each teacher."""
        for name, groups in teachers.items():
            labels = groups.labels.of(extracted.ids)
            for student in groups.config.students:
                self.tables[Term(student, name)] = episode_table(
                    *(extracted.of(student), labels, groups.centroids, options, self.comm),
                    temperature=groups.config.target_temperature,
                )

    def state_share(self) -> dict[str, Tensor]:
        return every_nth(self.state_dict(), self.comm)

    def state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for term, table in self.tables.items():
            state[f"table/{term.name}/prototypes"] = self.comm.gather_rows(table.prototypes)
            state[f"table/{term.name}/targets"] = self.comm.gather_rows(table.targets)
            valid = self.comm.gather_rows(table.valid.to(torch.uint8))
            state[f"table/{term.name}/valid"] = valid
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
            self.tables[Term.named(name)] = PrototypeTable(
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
