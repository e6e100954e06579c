"""The tokens of captions as classes of images: a sharded row for each token of the vocabulary.

Rare tokens weigh more: ln((1 + N) / (1 + n_c)), where n_c of the N captions so far hold token c.
Captions are counted as they come, by all ranks together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import Frozen
from trainer.errors import CheckpointError
from trainer.losses.learned_prototypes import LogitOptions, prototype_statistics
from trainer.losses.token_classes import each_token_once, token_cross_entropy
from trainer.parts.prototype_head import PrototypeHead, PrototypeHeadConfig
from trainer.recipe import Context, Part, every_nth
from trainer.types import Batch, Losses


class TokenHeadConfig(PrototypeHeadConfig):
    """A row for each token."""

    sample_rate: float = Field(default=1.0, ge=0, le=1)
    """Share of the vocabulary that a step compares with, besides a caption's own tokens."""


class TokenClassesConfig(Frozen):
    """How images are classified by the tokens of their captions."""

    scale: float = Field(default=32.0, gt=0)
    """Of cosines. The published layer compares rows of any length; these are directions."""
    head: TokenHeadConfig = TokenHeadConfig()


class WeightedTokenClassesConfig(TokenClassesConfig):
    """Tokens of captions beside another task."""

    weight: float = Field(default=1.0, ge=0)
    """Of the loss; with 0 it is computed and logged, and moves nothing."""


class LearnsCaptionTokens(Frozen):
    """Of a recipe whose images may also be told the tokens of their captions. Stands before
    `RecipeConfig` among the bases of a `Config`."""

    caption_tokens: WeightedTokenClassesConfig | None = None
    """A lexical head: the tokens of its caption as classes of an image; none where None."""


class TokenFrequencies:
    """How many captions hold each token; a Part without gradients, equal on all ranks."""

    def __init__(self, size: int, comm: Comm) -> None:
        self._comm = comm
        self._counts = torch.zeros(size + 1, dtype=torch.int64, device=comm.device)
        """Captions with each token, and last their number."""
        self._now = self._counts

    def weights(self, labels: Int64[Tensor, "batch labels"]) -> Float[Tensor, " vocabulary"]:
        """Of every token, this step's captions of all ranks counted. -1 is no token."""
        size = len(self._counts) - 1
        new = torch.zeros_like(self._counts)  # no token is counted in the last place, then unset
        new.index_add_(0, labels.where(labels >= 0, size).flatten(), new.new_ones(labels.numel()))
        new[size:].fill_(len(labels))
        self._now = self._counts + self._comm.sum(new)
        documents = self._now[-1:].double()
        return ((1 + documents) / (1 + self._now[:-1])).log()

    def gradients_finite(self) -> None:
        return None

    def after_step(self, step: int, *, applied: bool, learning_rate_factor: float) -> None:
        self._counts = self._now = self._now if applied else self._counts

    def state_share(self) -> dict[str, Tensor]:
        return every_nth({"counts": self._counts.cpu()}, self._comm)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if len(state["counts"]) != len(self._counts):
            raise CheckpointError(
                f"the checkpoint has counts of {len(state['counts']) - 1} tokens, and the "
                f"tokenizer has {len(self._counts) - 1}"
            )
        self._counts = self._now = state["counts"].to(self._comm.device)


class TokenClassesTerm:
    """Labels, weights and loss; `parts` are what a recipe has to name."""

    def __init__(
        self,
        config: TokenClassesConfig,
        context: Context,
        tokenizer: PreTrainedTokenizerFast,
        *,
        dim: int,
    ) -> None:
        self._config, self._comm = config, context.comm
        self._specials = torch.tensor(tokenizer.all_special_ids, device=context.comm.device)
        size = len(tokenizer)
        self._head = PrototypeHead(
            config.head, num_prototypes=size, dim=dim, comm=context.comm, seed=context.seed
        )
        self._frequencies = TokenFrequencies(size, context.comm)
        self.parts: dict[str, Part] = {"words": self._head, "frequencies": self._frequencies}

    def loss(self, rows: Float[Tensor, "batch dim"], batch: Batch, step: int) -> Tensor:
        """Over the batch of all ranks; the same on each. A token counts once in a caption, and
        those that the tokenizer adds (begin, end, padding) don't."""
        assert batch.tokens is not None
        labels = each_token_once(batch.tokens, self._specials)
        weights = self._frequencies.weights(labels)
        head = self._head
        options = LogitOptions(scale=self._config.scale, gather_dtype=head.gather_dtype)
        active = head.active(labels, step)
        statistics = prototype_statistics(rows, labels, active, head.comm, options)
        everyones = head.comm.all_gather(labels)
        own = weights[everyones.clamp_min(0)]
        return token_cross_entropy(statistics, own, scale=self._config.scale)


class CaptionTokens:
    """The term `words` of a recipe that may have it; `parts` are what the recipe has to name."""

    def __init__(self, config: LearnsCaptionTokens, context: Context, *, dim: int) -> None:
        self._config = config.caption_tokens
        self.parts: dict[str, Part] = {}
        if self._config is not None:
            self._term = TokenClassesTerm(self._config, context, context.tokenizer, dim=dim)
            self.parts = self._term.parts

    def losses(self, rows: Float[Tensor, "batch dim"], batch: Batch, step: int) -> Losses:
        if self._config is None:
            return Losses()
        value = self._term.loss(rows, batch, step)
        return Losses().with_term("words", value, self._config.weight)
