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

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.cluster.kmeans import KMeansConfig, KMeansResult, kmeans
from trainer.cluster.progress import Interruptible
from trainer.cluster.report import agreement
from trainer.comm import Comm
from trainer.config import PositiveInt, RecipeConfig
from trainer.data.classes import class_labels
from trainer.data.labels import ClusterLabels
from trainer.errors import ConfigError
from trainer.losses.constant_prototypes import prototype_cross_entropy
from trainer.losses.contrastive import info_nce
from trainer.losses.units import at_least_float32
from trainer.losses.usage import prototype_overuse
from trainer.models.config import HeadedTwoTower
from trainer.models.self_supervised import build_towers_of_views
from trainer.models.two_tower import TwoTower, TwoTowerConfig
from trainer.parts.back_translation import TableOptions, Temperatures, softness, temperatures_of
from trainer.parts.caption_tokens import CaptionTokens, LearnsCaptionTokens
from trainer.parts.distillation import Distillation, Distils
from trainer.parts.episode import EpisodeTables, Term
from trainer.parts.episodes import Episodes, Extracted, extract, timed
from trainer.parts.known_groups import KnownGroups, KnowsGroups
from trainer.parts.overuse import OveruseConfig
from trainer.parts.self_supervision import ComparesViews, mean_over_views, self_supervision
from trainer.parts.teacher import Student, TeacherConfig, load_teachers, overlap, training_ids
from trainer.parts.teacher_digests import TeacherDigests
from trainer.parts.token_selection import token_parts
from trainer.recipe import Context, Encode, Part, Samples
from trainer.types import Batch, Features, Losses, Progress, TowerName

Clustered = Mapping[Student, KMeansResult]


class Config(ComparesViews, Distils, LearnsCaptionTokens, KnowsGroups, RecipeConfig):
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
    target_entropy: float | None = Field(default=None, gt=0)
    """Mean entropy of the internal pair's soft targets in nats, instead of a temperature: each
    episode finds, for each modality, the temperature that gives it. exp of it is the number of
    groups that a target is spread over."""
    overuse: OveruseConfig | None = None
    """A penalty on prototypes that everything uses, half of it for each term of a pair."""
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

    @model_validator(mode="after")
    def _overuse_of_something(self) -> Config:
        if self.overuse is not None and not (self.prototype_weight or self.teachers):
            raise ValueError(
                "overuse is of prototypes, and prototype_weight: 0 without teachers makes none; "
                "leave it out, or give prototype_weight"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_soften(self) -> Config:
        reached, given = math.log(self.clusters), self.model_fields_set
        if self.target_entropy is not None and not self.prototype_weight:
            raise ValueError("target_entropy is of the pair's targets, and prototype_weight is 0")
        if self.target_entropy is not None and "target_temperature" in given:
            raise ValueError("target_entropy finds target_temperature; give one of them")
        if self.target_entropy is not None and self.target_entropy >= reached:
            raise ValueError(f"target_entropy of {self.clusters} clusters is below {reached:.3g}")
        return self

    def knows_the_end(self) -> str | None:
        return (
            "recipe.locked_tail_episodes" if self.locked_tail_episodes else super().knows_the_end()
        )


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> TwoTower:
    return build_towers_of_views(
        *(config.model, tokenizer, comm or Comm.solo()),
        heads=config.heads,
        views=config.views,
        seed=seed,
    )


class Recipe:
    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.context, self.comm = config, context, context.comm
        self.model = build_model(config, context.tokenizer, context.comm, seed=context.seed)
        self.episode = EpisodeTables(context.comm)
        self.parts: dict[str, Part] = {
            "episode": self.episode,
            **token_parts(config, context, self.model, views=config.views),
        }
        self.groups = KnownGroups(config, context, dim=config.model.embed_dim)
        self.distilled = Distillation(config, config.model, context)
        self.words = CaptionTokens(config, context, dim=config.model.embed_dim)
        self.parts |= self.groups.parts | self.distilled.parts | self.words.parts
        self.episodes = Episodes.of_run(
            config.episode_samples,
            context,
            warmup=config.warmup_episodes,
            tail=config.locked_tail_episodes,
        )
        _check_sizes(config, self.episodes.samples)
        self.options = TableOptions(
            back_translation=config.back_translation,
            unit_centroids=config.unit_centroids,
            unit_tables=config.unit_tables,
            keep_empty=config.reference_zero_rows,
        )
        self.teachers, digests = load_teachers(
            config.teachers,
            context.comm,
            workdir=context.workdir,
            corpus=training_ids(context) if config.teachers else None,
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
        image, text, scale = map(features.tensor, ("image", "text", "logit_scale"))
        clip = mean_over_views(features, lambda view: info_nce(view, text, scale, self.comm))
        losses = Losses().with_term("clip", clip, self.config.clip_weight)
        for term in self.episode.tables:
            losses = losses.with_term(term.name, *self._prototype_term(term, features, batch))
            if self.config.overuse is not None:
                weight = self.config.overuse.weight_at(step) / 2
                losses = losses.with_term(
                    f"{term.name}_overuse", self._overused(term, features), weight
                )
        losses += self_supervision(self.config, features, batch, self.comm)
        losses += self.distilled.losses(features, batch)
        losses += self.words.losses(image, batch, step)
        return losses + self.groups.losses(image, batch, step)

    def _prototype_term(self, term: Term, features: Features, batch: Batch) -> tuple[Tensor, float]:
        if term.space in self.teachers:
            teacher = self.teachers[term.space]
            labels, weight = teacher.labels, teacher.weight
        else:
            labels, weight = self.episode.labels[term.space], self.config.prototype_weight
        value = prototype_cross_entropy(
            features.tensor(f"{term.student}_projected"),
            labels.of(batch.sample_id),
            self.episode.tables[term],
            features.tensor("prototype_scale"),
            self.comm,
        )
        return value, weight / 2

    def _overused(self, term: Term, features: Features) -> Tensor:
        table = self.episode.tables[term]
        rows = at_least_float32(features.tensor(f"{term.student}_projected"))
        return prototype_overuse(
            self.comm.all_gather(rows),
            table.prototypes.to(rows.dtype),
            features.tensor("prototype_scale").to(rows.dtype),
            self.comm,
            valid=table.valid,
        )

    # -- episodes -------------------------------------------------------------------------------

    def phase_due(self, progress: Progress) -> bool:
        return self.episodes.one_begins(progress)

    def locked_towers(self, progress: Progress) -> Collection[TowerName]:
        tail: tuple[TowerName, ...] = ("image",)
        return tail if self.episodes.in_tail(progress) else ()

    def begin_phase(
        self, progress: Progress, encode: Encode, samples: Samples
    ) -> Mapping[str, Any]:
        """Extract, cluster, translate (paper, algorithm 1); figures of each are returned."""
        figures: dict[str, Any] = {"episode": self.episodes.number(progress)}
        if self._is_plain(progress):
            self.episode.clear()
            return figures
        with timed(figures, "seconds_extract"):
            view = self.episodes.view(progress, samples, self.comm.world_size)
            extracted = extract(encode, view)
        with timed(figures, "seconds_cluster"):
            clustered: Clustered = {
                "image": self._clustered("image", extracted.image, extracted.ids),
                "text": self._clustered("text", extracted.text, extracted.ids),
            }
        with timed(figures, "seconds_translate"):
            temperatures = self._fill(extracted, clustered)
        figures |= agreement(clustered, extracted.ids, self.classes, self.comm)
        figures |= softness(clustered, self.options, self.comm, temperatures=temperatures)
        return figures | overlap(self.teachers, extracted.ids, clustered, self.comm)

    def shown_groups(self) -> ClusterLabels | None:
        return self.episode.labels.get("image")

    def _clustered(self, modality: Student, points: Tensor, ids: Tensor) -> KMeansResult:
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

    def _temperatures(self, clustered: Clustered) -> Temperatures:
        given, entropy = self.config.target_temperature, self.config.target_entropy
        return temperatures_of(
            clustered, self.options, self.comm, temperature=given, entropy=entropy
        )

    def _fill(self, extracted: Extracted, clustered: Clustered) -> Temperatures:
        """The episode's tables; the temperatures of its soft targets are returned."""
        temperatures = self._temperatures(clustered)
        self.episode.keep(extracted, clustered)
        if self.config.prototype_weight:
            self.episode.add_pair(extracted, clustered, self.options, temperatures=temperatures)
        self.episode.add_teachers(extracted, self.teachers, self.options)
        return temperatures

    # -- inside ---------------------------------------------------------------------------------

    def _is_plain(self, progress: Progress) -> bool:
        """Whether the episode that begins is one of CLIP alone."""
        weighs = self.config.prototype_weight or self.teachers
        outside = self.episodes.in_warmup(progress) or self.episodes.in_tail(progress)
        return outside or not weighs


def _check_sizes(config: Config, episode_samples: int) -> None:
    if config.clusters > episode_samples:
        raise ConfigError(
            f"recipe.clusters {config.clusters} is more than the {episode_samples} "
            f"samples of an episode; use at most {episode_samples // 10}, a tenth"
        )
    if not config.back_translation and config.teachers:
        raise ConfigError(
            "recipe.teachers need recipe.back_translation: a teacher's centroids live in its "
            "own space, where no student feature can be compared with them"
        )
