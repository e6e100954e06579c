"""Run evaluations by name."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import NamedTuple, get_args

from trainer.config import EvalConfig, Weights
from trainer.errors import ConfigError, TrainerError
from trainer.evals.context import EvalContext
from trainer.pulse import PULSE
from trainer.recipe import Encode


class Result(NamedTuple):
    """What an evaluation found, or why it found nothing. The same on every rank."""

    config: EvalConfig
    figures: dict[str, float]
    failure: str | None = None
    """One sentence."""


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
    refuse_equal_labels(configs)
    sharing = context._replace(encoded={})
    return {config.label: run_eval(config, encode, sharing) for config in configs}


def evaluate_each(
    configs: Sequence[EvalConfig], encode: Encode, context: EvalContext
) -> Iterator[Result]:
    """As `evaluate_all`, one after another; one that fails does not keep the others back."""
    sharing = context._replace(encoded={})
    for config in configs:
        with PULSE.phase(f"evaluation {config.label}"):
            figures, own = _attempt(config, encode, sharing)
        failures = sharing.comm.gather_json(own)
        failure = next((reason for reason in failures if reason is not None), None)
        yield Result(config, figures if failure is None else {}, failure)


def by_weights(configs: Sequence[EvalConfig]) -> Iterator[tuple[Weights, list[EvalConfig]]]:
    """The evaluations of each kind of weights that has any; each kind is another model."""
    for weights in get_args(Weights):
        if entries := [config for config in configs if config.weights == weights]:
            yield weights, entries


def refuse_equal_labels(configs: Sequence[EvalConfig]) -> None:
    labels = [config.label for config in configs]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ConfigError(f"several evaluations are labelled {', '.join(sorted(twice))}")


def _attempt(
    config: EvalConfig, encode: Encode, context: EvalContext
) -> tuple[dict[str, float], str | None]:
    try:
        return run_eval(config, encode, context), None
    except (TrainerError, OSError) as error:
        return {}, str(error)
    except Exception as error:  # our own bug, for which no step of training may be lost
        sys.stderr.write(traceback.format_exc())
        return {}, f"{type(error).__name__}: {error}"
