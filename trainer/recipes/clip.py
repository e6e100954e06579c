"""CLIP: symmetric InfoNCE over the global batch (arXiv 2103.00020). The baseline.

With `distill`, the student also learns the similarities that a frozen pair of towers sees; with
`prototypes`, its images are also compared with learnable rows for clusters or classes.
"""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RecipeConfig
from trainer.losses.contrastive import info_nce
from trainer.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from trainer.parts.distillation import DistillConfig, TeacherPair, distillation, teacher_part
from trainer.parts.prototypes import PrototypesTerm, WeightedPrototypesConfig
from trainer.parts.token_selection import SelectsTokens, token_parts
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(SelectsTokens, RecipeConfig):
    name: Literal["clip"] = "clip"
    model: TwoTowerConfig = TwoTowerConfig()
    distill: DistillConfig | None = None
    """A frozen teacher, from two embedding stores; none where None."""
    prototypes: WeightedPrototypesConfig | None = None
    """Clusters or classes of the images as a further term; none where None."""

    def join(self, seed: int) -> TeacherPair | None:
        return None if self.distill is None else self.distill.join()


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> TwoTower:
    return build_two_tower(config.model, tokenizer, comm, seed=seed)


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.comm, self.distill = context.comm, config.distill
        self.model = build_model(config, context.tokenizer, context.comm, seed=context.seed)
        self.parts: dict[str, Part] = token_parts(config, context, self.model)
        if config.distill is not None:
            captions = context.data.captions
            self.parts["teacher"] = teacher_part(config.distill, captions, context.comm)
        self.prototypes: PrototypesTerm | None = None
        if config.prototypes is not None:
            dim = config.model.embed_dim
            self.prototypes = PrototypesTerm(config.prototypes, context, dim=dim)
            self.parts["head"] = self.prototypes.head

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        assert features.image is not None
        assert features.text is not None
        assert features.logit_scale is not None
        losses = Losses.of(
            clip=info_nce(features.image, features.text, features.logit_scale, self.comm)
        )
        if self.distill is not None:
            value = distillation(self.distill, features, batch, self.comm)
            losses = losses.with_term("distill", value, self.distill.weight)
        if self.prototypes is not None:
            losses += self.prototypes.losses(features, batch, step)
        return losses
