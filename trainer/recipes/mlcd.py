"""An image tower alone, trained against prototypes that it learns (MLCD, arXiv 2407.17331).

    log(1 + sum_k e^(-s phi_k)) + log(1 + sum_j e^(s c_j))

over a sample's clusters k and drawn others j, of cosines c and phi = c - margin. `mlc` is the
paper's baseline and `slots` the mean of one cross-entropy for each label, with shared negatives.
The positive term vanishes at a cosine of about 0.4 and the negative term hardly falls, so the loss
stays large while the features get better; both are logged apart. `partial_fc`, `unicom` and `rice`
are recipes of their own; run files that spell them with `name: mlcd` go on as they are.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from trainer.parts.image_prototypes import ImagePrototypes, ImagePrototypesConfig, build_model
from trainer.parts.known_groups import KnownGroups, KnowsGroups
from trainer.parts.overuse import OveruseConfig
from trainer.parts.prototypes import compared_rows
from trainer.parts.token_selection import SelectsTokens, token_parts
from trainer.recipe import Context
from trainer.types import Batch, Features, Losses

__all__ = ["Config", "Recipe", "build_model"]


class Config(SelectsTokens, KnowsGroups, ImagePrototypesConfig):
    """Defaults are MLCD's."""

    name: Literal["mlcd"] = "mlcd"
    overuse: OveruseConfig | None = None
    """A penalty on prototypes that everything uses, of the rows that a step compares with."""

    @model_validator(mode="after")
    def _one_draw_of_negatives(self) -> Config:
        if self.overuse is not None and self.negatives == "each":
            raise ValueError(
                "overuse is of one draw of prototypes a step; set negatives: shared, or drop it"
            )
        return self


class Recipe(ImagePrototypes):
    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self.term.overuse = config.overuse
        self.parts |= token_parts(config, context, self.model)
        self.groups = KnownGroups(config, context, dim=config.model.compared_dim)
        self.parts |= self.groups.parts

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        found = super().losses(features, batch, step)
        return found + self.groups.losses(compared_rows(features), batch, step)
