"""Run evaluations by name."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, get_args

from trainer.addresses import without_secrets
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
    sharing, found = context._replace(encoded={}), dict[str, dict[str, float]]()
    for config in configs:
        found[config.label] = with_gap(config, run_eval(config, encode, sharing), found)
    return found


def with_gap(
    config: EvalConfig, figures: dict[str, float], before: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """With how many points of top1 the evaluation that it is compared with is ahead."""
    if config.gap_to is None or "top1" not in before.get(config.gap_to, {}):
        return figures  # the other one has failed, and said so
    return {**figures, "gap": before[config.gap_to]["top1"] - figures["top1"]}


def evaluate_each(
    configs: Sequence[EvalConfig], encode: Encode, context: EvalContext
) -> Iterator[Result]:
    """As `evaluate_all`, one after another; one that fails does not keep the others back."""
    sharing, found = context._replace(encoded={}), dict[str, dict[str, float]]()
    for config in configs:
        with PULSE.phase(f"evaluation {config.label}"):
            figures, own = _attempt(config, encode, sharing)
        failures = sharing.comm.gather_json(own)
        failure = next((reason for reason in failures if reason is not None), None)
        found[config.label] = {} if failure else with_gap(config, figures, found)
        yield Result(config, found[config.label], failure)


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
        sys.stderr.write(without_secrets(traceback.format_exc()))
        return {}, f"{type(error).__name__}: {error}"
