"""A plan in words, and the words of a command that ask for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.plan.cards import UTILISATION, WIRE_UTILISATION, Card, card_of
from trainer.plan.plan import ROOM, Plan, epochs, gigabytes, planned

_DIVIDED = {
    0: "nothing is divided",
    1: "moments are divided over the ranks",
    2: "moments and gradients are divided over the ranks",
    3: "weights, gradients and moments are divided over the ranks",
}


class Asked(NamedTuple):
    """What `--plan` was given."""

    world_size: int = 8
    card: Card = card_of("h100")
    utilisation: float = UTILISATION
    samples: int | None = None
    short: bool = False


def read_words(words: Sequence[str]) -> Asked:
    """`world_size=64 card=h100 utilisation=0.4 samples=407332084 short`, each where it differs."""
    asked = Asked()
    for word in words:
        key, _, value = word.partition("=")
        if word == "short":
            asked = asked._replace(short=True)
        elif key == "card":
            asked = asked._replace(card=card_of(value))
        elif key == "world_size":
            asked = asked._replace(world_size=int(_positive(word, value)))
        elif key == "samples":
            asked = asked._replace(samples=int(_positive(word, value)))
        elif key == "utilisation":
            asked = asked._replace(utilisation=_positive(word, value))
        else:
            raise ConfigError(
                f"--plan knows no {word!r}; it takes world_size=N card=NAME utilisation=SHARE "
                "samples=N short (and overrides of the run stand before it)"
            )
    if asked.utilisation > 1:
        raise ConfigError(f"utilisation={asked.utilisation} is a share of the peak; at most 1")
    return asked


def _positive(word: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e15 or ("utilisation" not in word and not value.is_integer()):
        raise ConfigError(
            f"--plan {word}: write a number above zero, whole where things are counted"
        )
    return value


def plan_text(config: RunConfig, words: Sequence[str]) -> str:
    """What `python -m trainer RUN.yaml --plan ...` prints."""
    asked = read_words(words)
    plan = planned(
        config,
        card=asked.card,
        world_size=asked.world_size,
        utilisation=asked.utilisation,
        samples=asked.samples,
    )
    return short(plan) if asked.short else "\n".join(_lines(plan))


def short(plan: Plan) -> str:
    """One line."""
    return (
        f"plan: {gigabytes(plan.total_bytes)} a rank, {plan.samples_per_second:,.0f} samples a "
        f"second, {_time(plan.hours)} of training on {plan.world_size} x {plan.card.name} at "
        f"{plan.utilisation:.0%} of {plan.card.tflops:g} TFLOP/s (assumed)"
    )


def _lines(plan: Plan) -> list[str]:
    config, count = plan.config, plan.weights.learnt
    passes = epochs(plan)
    through = "" if passes is None else f", {passes:.1f} epochs of {plan.samples_per_epoch:,}"
    return [
        f"{config.recipe.name}: {config.steps:,} steps of {config.global_batch:,} samples{through}",
        f"{plan.world_size} x {plan.card.name}: {plan.num_micro_batches} micro-batches of "
        f"{plan.micro_batch} a rank; {count / 1e6:.1f} M weights trained, "
        f"{plan.weights.frozen / 1e6:.1f} M frozen, "
        f"{'bfloat16' if plan.stage.width == 2 else 'float32'}",
        "",
        *_table("memory of a rank", plan.memory, gigabytes, plan.total_bytes),
        _room(plan),
        "",
        *_table("FLOPs of a rank and step", plan.flops, _flops, sum(plan.flops.values())),
        f"  of the model itself {_flops(plan.model_flops)}; of the run on all ranks "
        f"{plan.run_flops:.3g}",
        "",
        *_table("whole tensors sent in a step", plan.sent, gigabytes, None),
        f"  {gigabytes(plan.wire)} leave each rank",
        "",
        *_pace(plan),
        "",
        _stage(plan),
        *dict.fromkeys(plan.notes),
    ]


def _table(title: str, values: object, shown: object, total: float | None) -> list[str]:
    assert isinstance(values, dict)
    assert callable(shown)
    rows = [f"  {name:<24}{shown(value):>12}" for name, value in values.items() if value]
    last = [] if total is None else [f"  {'in all':<24}{shown(total):>12}"]
    return [title, *(rows or ["  nothing"]), *last]


def _room(plan: Plan) -> str:
    there = plan.card.memory_gib * 2**30
    if plan.fits:
        return f"  fits: {plan.total_bytes / there:.0%} of {plan.card.memory_gib:.0f} GiB"
    return (
        f"  DOES NOT FIT {ROOM:.0%} of {plan.card.memory_gib:.0f} GiB; a smaller micro_batch "
        "shrinks activations, more ranks or a higher stage the rest"
    )


def _pace(plan: Plan) -> list[str]:
    each = plan.samples_per_second / plan.world_size
    lines = [
        f"{plan.samples_per_second:,.0f} samples a second, {_time(plan.hours)}: "
        f"{plan.compute_seconds:.3g} s of products a step at {plan.utilisation:.0%} of "
        f"{plan.card.tflops:g} TFLOP/s, {plan.step_seconds - plan.compute_seconds:.3g} s of "
        f"traffic at {WIRE_UTILISATION:.0%} of the links (both assumed; nothing overlaps)",
        f"readers must bring {each:,.0f} images a second to each rank, or training waits for them",
    ]
    if plan.episode is not None:
        lines.append(
            f"{plan.episode.times} clusterings of {plan.episode.samples:,} samples, "
            f"{plan.episode_seconds:.3g} s each"
        )
    return lines


def _stage(plan: Plan) -> str:
    best, own = plan.best_stage, plan.stage.number
    sizes = ", ".join(f"{n}: {gigabytes(size)}" for n, size in plan.by_stage.items())
    why = (
        f"the lowest that fits, and every stage above it sends more ({_DIVIDED[best]})"
        if plan.by_stage[best] <= ROOM * plan.card.memory_gib * 2**30
        else "no stage fits, and it keeps least"
    )
    verdict = "which the run file has" if best == own else f"the run file has ZeRO-{own}"
    return f"a rank under ZeRO-{sizes}; take ZeRO-{best}, {verdict}: {why}"


def _flops(count: float) -> str:
    return f"{count / 1e12:.4g} T" if count >= 1e11 else f"{count / 1e9:.3g} G"


def _time(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} hours" if hours < 100 else f"{hours:.0f} hours"
