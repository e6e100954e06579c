"""What every rank prepares by itself before a run begins, and the ranks' agreement on it.

A mistake that only one host has (a folder that is not mounted, another version of a package) would
leave the others waiting in a collective. So ranks meet first, each says whether it is ready and
what it would run, and if one is not, or would run something else, all end by the same sentence.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from trainer.addresses import without_secrets
from trainer.errors import ConfigError, TrainerError
from trainer.meeting import Place, meeting_point, met_before, read_place

T = TypeVar("T")
MEET_SECONDS = 1800.0
"""Ranks wait so long for each other: hosts of a queue start at different times."""
ALONE_SECONDS = 10.0
"""A rank that can't go on tries so long to tell the others before it says so by itself; and after
the first bad news all wait so long for what the rest have to say."""


class Facts(NamedTuple):
    """Things that must be equal on all ranks, and how to make them so."""

    kind: str
    """What a value is, as `package`."""
    remedy: str
    values: Mapping[str, str]


def prepared_together(prepare: Callable[[], tuple[T, Sequence[Facts]]]) -> T:
    """What `prepare` gives on this rank, where it succeeds on all and they agree on the facts.

    Else a ConfigError on all ranks, which names rank, host and mistake. Exceptions of our own are
    told to the others too, and raised here.
    """
    place = read_place(os.environ)
    if place.world_size == 1:
        return prepare()[0]
    try:
        value, facts = prepare()
    except BaseException as error:
        _tell_and_raise(place, error)
        raise
    store = meeting_point(place, timedelta(seconds=MEET_SECONDS))
    _agree(store, place, _differing(store, place, facts))
    met_before(place, store)
    return value


def _tell_and_raise(place: Place, error: BaseException) -> None:
    """Raises the sentence of all ranks, where they can be reached."""
    told = isinstance(error, TrainerError)
    text = str(error) if told else f"{type(error).__name__}: {str(error)[:500]}"
    try:
        store = meeting_point(place, timedelta(seconds=ALONE_SECONDS))
    except ConfigError:
        if told and place.rank:  # rank 0 speaks for itself
            say(f"rank {place.rank} on {socket.gethostname()}: {text}")
        return
    _publish(store, place, ())
    try:
        _agree(store, place, text)
    except ConfigError:
        if told:
            raise


def _publish(store: dist.Store, place: Place, facts: Sequence[Facts]) -> None:
    if place.rank == 0:
        store.set("facts", json.dumps([socket.gethostname(), facts]))


def _differing(store: dist.Store, place: Place, facts: Sequence[Facts]) -> str:
    """How this rank's facts differ from those of rank 0, in a sentence; empty where they don't."""
    _publish(store, place, facts)
    host, theirs = json.loads(store.get("facts").decode())
    told = {kind: values for kind, _, values in theirs}
    return "; ".join(
        _difference(mine, told[mine.kind], host)
        for mine in facts
        if told.get(mine.kind, mine.values) != mine.values
    )


def _difference(mine: Facts, theirs: Mapping[str, str], host: str) -> str:
    names = sorted(n for n in {*mine.values, *theirs} if mine.values.get(n) != theirs.get(n))
    said = [
        f"{mine.kind} {name} is {mine.values.get(name, 'missing')} here and "
        f"{theirs.get(name, 'missing')} on rank 0 ({host})"
        for name in names[:3]
    ]
    more = f", and {len(names) - 3} more differ" if len(names) > 3 else ""
    return f"{', '.join(said)}{more}; {mine.remedy}"


def _agree(store: dist.Store, place: Place, failure: str) -> None:
    """ConfigError on all ranks, with each one's reason, if there is a failure on one of them."""
    if failure:
        number = store.add("failures", 1)
        store.set(f"failure/{number}", json.dumps([place.rank, socket.gethostname(), failure]))
    store.add("ready", 1)
    until = None
    while store.add("ready", 0) < place.world_size:
        if until is None and store.add("failures", 0):
            until = time.monotonic() + ALONE_SECONDS
        if until is not None and time.monotonic() >= until:
            break
        time.sleep(0.02)
    if count := store.add("failures", 0):
        told = [json.loads(store.get(f"failure/{n}").decode()) for n in range(1, count + 1)]
        _end(store, place, in_one_sentence(sorted(told), place.world_size))


def in_one_sentence(told: Sequence[tuple[int, str, str]], world_size: int) -> str:
    reasons = {reason for *_, reason in told}
    if len(reasons) == 1 and len(told) == world_size:
        return next(iter(reasons))
    hosts: dict[tuple[str, str], list[int]] = {}
    for rank, host, reason in told:
        hosts.setdefault((host, reason), []).append(rank)
    return "; ".join(
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} on {host}: {reason}"
        for (host, reason), ranks in hosts.items()
    )


def _end(store: dist.Store, place: Place, sentence: str) -> None:
    """Raise the sentence. Rank 0 says it before anybody leaves: launchers kill who is left."""
    error = ConfigError(sentence)
    error.on_all_ranks = error.is_said = True
    if place.rank == 0:
        say(sentence)
        store.set("said", "")
        _wait(lambda: store.add("left", 0) >= place.world_size - 1)
    else:
        _wait(lambda: store.check(["said"]))
        store.add("left", 1)
    raise error


def say(sentence: str) -> None:
    sys.stderr.write(without_secrets(f"error: {sentence}\n"))
    sys.stderr.flush()


def _wait(condition: Callable[[], bool], *, seconds: float = ALONE_SECONDS) -> None:
    """Not for ever, and not for who is gone."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end and not condition():
            time.sleep(0.02)
    except (dist.DistNetworkError, dist.DistStoreError):
        return
