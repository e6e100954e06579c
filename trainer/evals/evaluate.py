"""Run evaluations by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from trainer.config import EvalConfig
from trainer.errors import ConfigError
from trainer.evals.context import EvalContext
from trainer.recipe import Encode


def run_eval(config: EvalConfig, encode: Encode, context: EvalContext) -> dict[str, float]:
    """Figures of one evaluation, the same on every rank and for any number of ranks.

    Collective: every rank calls it with the same configuration.
    """
    figures: dict[str, float] = importlib.import_module(f"trainer.evals.{config.name}").run(
        config, encode, context
    )
    return figures


def evaluate_all(
    configs: Sequence[EvalConfig], encode: Encode, context: EvalContext
) -> dict[str, dict[str, float]]:
    """Figures by label, in the order given. Shards that several of them use are encoded once."""
    labels = [config.label for config in configs]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ConfigError(f"several evaluations are labelled {', '.join(sorted(twice))}")
    sharing = context._replace(encoded={})
    return {config.label: run_eval(config, encode, sharing) for config in configs}
