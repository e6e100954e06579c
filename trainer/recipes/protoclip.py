"""ProtoCLIP: CLIP with prototypes from episodic clustering (arXiv 2206.10996).

Training runs in episodes. At the start of one, features of its samples are extracted and each
modality is clustered; a group found in one space is then averaged in the other (prototypical back
translation), and the pass over the samples pulls every feature towards the prototype of its group.
Frozen teachers contribute groups of their own, found once over the whole corpus.

Beyond the original: labels are joined by sample id, the gradient of the towers is exact (the
original's is 1/W of it, so its clip norm of 10 is 10 * W here), targets are float32, empty
prototypes leave the softmax, and an episode is a stretch of the stream without repetition.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.cluster.kmeans import KMeansConfig, KMeansResult, kmeans
from trainer.cluster.progress import Interruptible
from trainer.cluster.quality import normalized_mutual_information
from trainer.cluster.report import agreement, unknown_rate
from trainer.cluster.translate import group_means
from trainer.comm import Comm
from trainer.config import PositiveInt, RecipeConfig
from trainer.data.classes import class_labels
from trainer.data.labels import ClusterLabels
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError
from trainer.long_work import counted
from trainer.losses.constant_prototypes import (
    PrototypeTable,
    prototype_cross_entropy,
    prototype_table,
    target_figures,
)
from trainer.losses.contrastive import info_nce
from trainer.losses.units import unit_rows
from trainer.models.config import HeadedTwoTower
from trainer.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from trainer.parts.episode import EpisodeTables
from trainer.parts.teacher import TeacherConfig, load_teachers
from trainer.parts.teacher_digests import TeacherDigests
from trainer.parts.token_selection import SelectsTokens, token_parts
from trainer.recipe import Context, Encode, Part, Samples
from trainer.types import Batch, Features, Losses, Progress, TowerName

Modality = Literal["image", "text"]
OTHER: Mapping[Modality, Modality] = {"image": "text", "text": "image"}


class Config(SelectsTokens, RecipeConfig):
    """Defaults are the recipe of the paper's 8-GPU run; K is a tenth of an episode."""

    name: Literal["protoclip"] = "protoclip"
    model: HeadedTwoTower = Field(default=TwoTowerConfig(), validate_default=True)
    reads = frozenset({"head"})
    episode_samples: PositiveInt = 200_000
    """Samples between two clusterings, over all ranks; rounded up to whole global batches."""
    clusters: PositiveInt = 20_000
    """Per modality."""
    clip_weight: float = Field(default=1.0, ge=0)
    """Weight of CLIP's term; that of prototypes is `prototype_weight`."""
    prototype_weight: float = Field(default=1.0, ge=0)
    """Of the internal pair: text groups teach images, image groups teach texts."""
    target_temperature: float = 0.01
    """Of the internal pair's soft targets; 0 or less means one-hot."""
    teachers: tuple[TeacherConfig, ...] = ()
    warmup_episodes: int = Field(default=1, ge=0)
    """Episodes of plain CLIP at the start."""
    back_translation: bool = True
    """False compares a feature with the other modality's centroids instead of translated ones."""
    kmeans_iterations: PositiveInt = 20
    """Updates of the centroids per episode."""
    kmeans_restarts: PositiveInt = 1
    """The original keeps the best of 3."""
    kmeans_backend: Literal["torch", "faiss"] = "torch"
    """`torch` is spread over the ranks; `faiss` is for comparison, on one."""
    spherical: bool = False
    """Keep centroids at length one."""
    warm_start: bool = True
    """Start from the centroids of the episode before; the original never does."""
    unit_centroids: bool = False
    """Scale centroids to length one before soft targets are made of them."""
    unit_tables: bool = False
    """Scale prototypes to length one."""
    reference_zero_rows: bool = False
    """Keep empty prototypes as classes of logit zero, as the original does."""
    locked_tail_episodes: int = Field(default=0, ge=0)
    """Last episodes of plain CLIP with a locked image tower; the original has 2."""
    classes: str | None = None
    """json key of known classes, to log how well clusters agree with them."""


class Extracted(NamedTuple):
    """This rank's share of an episode."""

    ids: Tensor
    image: Tensor
    text: Tensor


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> TwoTower:
    return build_two_tower(config.model, tokenizer, comm, seed=seed)


class Recipe:
    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.context, self.comm = config, context, context.comm
        self.model = build_model(config, context.tokenizer, context.comm, seed=context.seed)
        self.episode = EpisodeTables(context.comm)
        self.parts: dict[str, Part] = {
            "episode": self.episode,
            **token_parts(config, context, self.model),
        }
        batch = context.global_batch
        self.episode_samples = -(-config.episode_samples // batch) * batch
        self._check_sizes()
        self.teachers, digests = load_teachers(
            config.teachers,
            context.comm,
            workdir=context.workdir,
            corpus=_corpus(config, context),
            check=context.check,
        )
        if digests:
            self.parts["teachers"] = TeacherDigests(digests, context.comm)
        self.classes = (
            class_labels(
                context.data.train,
                config.classes,
                context.comm,
                budget=context.data.bad_sample_budget,
            )
            if config.classes
            else None
        )

    # -- the objective --------------------------------------------------------------------------

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        """w_clip L_clip + w_proto (L_image + L_text) / 2 + the same for each teacher."""
        assert features.image is not None
        assert features.text is not None
        assert features.logit_scale is not None
        clip = info_nce(features.image, features.text, features.logit_scale, self.comm)
        losses = Losses().with_term("clip", clip, self.config.clip_weight)
        for term in self.episode.tables:
            losses = losses.with_term(term, *self._prototype_term(term, features, batch))
        return losses

    def _prototype_term(self, term: str, features: Features, batch: Batch) -> tuple[Tensor, float]:
        """A term is `<student>_from_<space that was clustered>`."""
        student, _, space = term.partition("_from_")
        projected = {"image": features.image_projected, "text": features.text_projected}[student]
        assert projected is not None
        assert features.prototype_scale is not None
        groups = (
            self.teachers[space].labels if space in self.teachers else self.episode.labels[space]
        )
        value = prototype_cross_entropy(
            projected,
            groups.of(batch.sample_id),
            self.episode.tables[term],
            features.prototype_scale,
            self.comm,
        )
        weight = (
            self.teachers[space].weight if space in self.teachers else self.config.prototype_weight
        )
        return value, weight / 2

    # -- episodes -------------------------------------------------------------------------------

    def phase_due(self, progress: Progress) -> bool:
        return progress.samples % self.episode_samples == 0

    def locked_towers(self, progress: Progress) -> Collection[TowerName]:
        tail: tuple[TowerName, ...] = ("image",)
        return tail if self._in_tail(progress) else ()

    def begin_phase(
        self, progress: Progress, encode: Encode, samples: Samples
    ) -> Mapping[str, Any]:
        """Extract, cluster, translate (paper, algorithm 1); figures of each are returned."""
        number = progress.samples // self.episode_samples
        figures: dict[str, Any] = {"episode": number}
        if number < self.config.warmup_episodes or self._in_tail(progress) or not self._weighs():
            self.episode.clear()
            return figures
        with _timed(figures, "seconds_extract"):
            view = samples.view(progress.samples, self.episode_samples, purpose="extract")
            own = -(-self.episode_samples // self.comm.world_size)
            extracted = _extract(
                encode,
                counted(
                    view, "extracting", total=own, unit="samples", size=lambda b: len(b.sample_id)
                ),
            )
        with _timed(figures, "seconds_cluster"):
            clustered: dict[Modality, KMeansResult] = {
                "image": self._clustered("image", extracted.image, extracted.ids),
                "text": self._clustered("text", extracted.text, extracted.ids),
            }
        with _timed(figures, "seconds_translate"):
            self._fill(extracted, clustered)
        figures |= agreement(clustered, extracted.ids, self.classes, self.comm)
        for space, result in clustered.items():
            figures |= self._softness(space, result)
        for name, groups in self.teachers.items():
            figures[f"{name}_unknown_rate"] = unknown_rate(groups.labels, extracted.ids, self.comm)
            known = groups.labels.of(extracted.ids)
            for space, result in clustered.items():
                figures[f"nmi_{space}_{name}"] = normalized_mutual_information(
                    result.labels, known, self.comm
                )
        return figures

    def shown_groups(self) -> ClusterLabels | None:
        return self.episode.labels.get("image")

    def _clustered(self, modality: Modality, points: Tensor, ids: Tensor) -> KMeansResult:
        config = KMeansConfig(
            clusters=self.config.clusters,
            iterations=self.config.kmeans_iterations,
            restarts=self.config.kmeans_restarts,
            backend=self.config.kmeans_backend,
            spherical=self.config.spherical,
        )
        start = self.episode.centroids.get(modality) if self.config.warm_start else None
        observer = Interruptible(self.context.check)
        return kmeans(points, ids, config, self.comm, initial=start, observer=observer)

    def _fill(self, extracted: Extracted, clustered: Mapping[Modality, KMeansResult]) -> None:
        """The episode's labels and, for each term, its table of prototypes."""
        self.episode.clear()
        rows = {"image": extracted.image, "text": extracted.text}
        for student, teacher in OTHER.items():
            result = clustered[teacher]
            self.episode.centroids[teacher] = result.centroids
            self.episode.labels[teacher] = ClusterLabels.gather(
                extracted.ids, result.labels, self.comm
            )
            if self.config.prototype_weight:
                self.episode.tables[f"{student}_from_{teacher}"] = self._table(
                    rows[student],
                    result.labels,
                    self._shard(result.centroids),
                    self.config.target_temperature,
                )
        for name, groups in self.teachers.items():
            labels = groups.labels.of(extracted.ids)
            for student in groups.config.students:
                self.episode.tables[f"{student}_from_{name}"] = self._table(
                    rows[student], labels, groups.centroids, groups.config.target_temperature
                )

    def _table(
        self, features: Tensor, labels: Tensor, centroids: Tensor, temperature: float
    ) -> PrototypeTable:
        """P by back translation (or the teacher's centroids themselves), T by the temperature."""
        num_groups = int(self.comm.sum(torch.tensor(centroids.shape[0], device=self.comm.device)))
        means = group_means(features, labels, num_groups=num_groups, comm=self.comm)
        prototypes = means.rows if self.config.back_translation else centroids
        teacher = unit_rows(centroids) if self.config.unit_centroids else centroids
        keep_empty = self.config.reference_zero_rows
        return prototype_table(
            unit_rows(prototypes) if self.config.unit_tables else prototypes,
            teacher,
            valid=torch.ones_like(means.counts, dtype=torch.bool)
            if keep_empty
            else means.counts > 0,
            num_prototypes=num_groups,
            temperature=temperature,
            comm=self.comm,
        )

    def _shard(self, rows: Tensor) -> Tensor:
        first, last = self.comm.row_range(rows.shape[0])
        return rows[first:last]

    def _softness(self, space: Modality, result: KMeansResult) -> dict[str, float]:
        """Own mass, entropy and misplaced peaks of the soft targets that these clusters give."""
        centroids, counts = self._shard(result.centroids), self._shard(result.counts)
        figures = target_figures(
            unit_rows(centroids) if self.config.unit_centroids else centroids,
            counts=counts,
            valid=counts > 0,
            num_prototypes=result.centroids.shape[0],
            temperature=self.config.target_temperature,
            comm=self.comm,
        )
        return {f"{space}_target_{k}": float(v) for k, v in figures._asdict().items()}

    # -- inside ---------------------------------------------------------------------------------

    def _weighs(self) -> bool:
        return bool(self.config.prototype_weight or self.teachers)

    def _in_tail(self, progress: Progress) -> bool:
        number = progress.samples // self.episode_samples
        episodes = -(-self.context.steps * self.context.global_batch // self.episode_samples)
        return number >= episodes - self.config.locked_tail_episodes

    def _check_sizes(self) -> None:
        if self.config.clusters > self.episode_samples:
            raise ConfigError(
                f"recipe.clusters {self.config.clusters} is more than the {self.episode_samples} "
                f"samples of an episode; use at most {self.episode_samples // 10}, a tenth"
            )
        if not self.config.back_translation and self.config.teachers:
            raise ConfigError(
                "recipe.teachers need recipe.back_translation: a teacher's centroids live in its "
                "own space, where no student feature can be compared with them"
            )


def _corpus(config: Config, context: Context) -> Tensor | None:
    """Ids of the training samples; None where no index tells them, or nobody asks."""
    if not config.teachers or context.data.reader != "indexed":
        return None
    return torch.as_tensor(ShardSet.open(context.data.train).ids)


def _extract(encode: Encode, view: Iterable[Batch]) -> Extracted:
    """Projected features of this rank's share of the episode; filling rows are dropped."""
    ids, image, text = [], [], []
    for batch in view:
        features = encode(batch)
        assert features.image_projected is not None
        assert features.text_projected is not None
        real = batch.sample_id >= 0
        ids.append(batch.sample_id[real])
        image.append(features.image_projected[real])
        text.append(features.text_projected[real])
    return Extracted(torch.cat(ids), torch.cat(image), torch.cat(text))


@contextmanager
def _timed(figures: dict[str, Any], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    figures[name] = round(time.perf_counter() - start, 3)
