"""What a run's configuration means: its tokenizer, stream, and the contexts of recipe and evals."""

from __future__ import annotations

from typing import Any, cast

from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.data.stream import Stream
from trainer.data.vocabulary import tokenizer_for
from trainer.evals import EvalContext
from trainer.models.two_tower import TwoTowerConfig
from trainer.recipe import Context


def model_of(config: RunConfig) -> TwoTowerConfig:
    return cast(TwoTowerConfig, cast(Any, config.recipe).model)


def tokenizer_of(config: RunConfig, comm: Comm) -> PreTrainedTokenizerFast:
    """The tokenizer that the run names, or one trained on its captions and kept in its workdir."""
    model = model_of(config)
    return tokenizer_for(
        model.tokenizer or model.text.path,
        config.data,
        comm,
        folder=config.workdir / "tokenizer",
        vocabulary=model.vocabulary,
        length=model.text_length,
        seed=config.seed,
    )


def stream_of(
    config: RunConfig, comm: Comm, tokenizer: PreTrainedTokenizerFast, *, micro_batch: int
) -> Stream:
    model = model_of(config)
    return Stream(
        config.data,
        comm,
        tokenizer=tokenizer,
        image_size=model.image_size,
        text_length=model.text_length,
        seed=config.seed,
        global_batch=config.global_batch,
        micro_batch=micro_batch,
        workdir=config.workdir,
    )


def context_of(config: RunConfig, comm: Comm, tokenizer: PreTrainedTokenizerFast) -> Context:
    return Context(
        comm=comm,
        tokenizer=tokenizer,
        seed=config.seed,
        global_batch=config.global_batch,
        steps=config.steps,
        workdir=config.workdir,
        data=config.data,
    )


def eval_context(config: RunConfig, comm: Comm, tokenizer: PreTrainedTokenizerFast) -> EvalContext:
    model = model_of(config)
    return EvalContext(
        comm, tokenizer, model.image_size, model.text_length, config.data, config.seed
    )
