"""How ranks find each other: what the environment says, and a wait that says for whom."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from trainer.errors import ConfigError

SAY_EVERY_SECONDS = 60.0
"""A rank that waits for others says so this often."""
_ALL = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HOW = (
    "launch by `deepspeed --module trainer`, `torchrun -m trainer` or a script of launch/, "
    "or set all of " + ", ".join(_ALL)
)


class Place(NamedTuple):
    """Where this process stands among the others."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    def as_environment(self) -> dict[str, str]:
        """What other libraries read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def read_place(environment: Mapping[str, str]) -> Place:
    """The place that a launcher has written into the environment; alone where there is none.

    A ConfigError where it is half written or says nonsense.
    """
    given = {name: environment[name].strip() for name in _ALL if environment.get(name, "").strip()}
    if "RANK" not in given and "WORLD_SIZE" not in given:
        _refuse_unlaunched(environment)
        return Place()
    world_size, rank = (_number(given, name, at_least) for name, at_least in SIZES)
    if rank >= world_size:
        raise ConfigError(f"RANK is {rank}, but WORLD_SIZE is {world_size}; ranks count from 0")
    local = {"LOCAL_RANK": environment.get("LOCAL_RANK", "").strip() or "0"}
    place = Place(rank, world_size, _number(local, "LOCAL_RANK", 0))
    if world_size == 1:
        return place
    missing = [name for name in _ALL if name not in given]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not set for {world_size} ranks; {_HOW}")
    port = _number(given, "MASTER_PORT", 1)
    if port > 65535:
        raise ConfigError(f"MASTER_PORT is {port}; ports end at 65535")
    return place._replace(address=given["MASTER_ADDR"], port=port)


SIZES = (("WORLD_SIZE", 1), ("RANK", 0))


def meeting_point(place: Place, timeout: timedelta) -> dist.Store:
    """The store in which the ranks meet, once all of them are there.

    Rank 0 holds it, unless torchrun does. Whoever waits for more than a minute says for whom.
    """
    if place.world_size == 1:
        return dist.HashStore()
    try:
        socket.getaddrinfo(place.address, place.port)
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR {place.address!r} is no known host: {error}") from error
    if (met := _met.pop(place, None)) is not None:
        met.set_timeout(timeout)
        return met
    deadline = time.monotonic() + timeout.total_seconds()
    server = _connected(place, deadline)
    _starts[place] = (server, _attempt(server, place, deadline))
    store = dist.PrefixStore(_starts[place][1], server)
    store.set_timeout(timeout)
    return store


_starts: dict[Place, tuple[dist.Store, str]] = {}
"""The server, which must outlive the group, and the prefix of this start in it."""


_channels = itertools.count()


def side_channel(place: Place) -> dist.Store:
    """A connection of its own to the ranks' store, for a thread; alone where nobody has met."""
    if place not in _starts:
        return dist.HashStore()
    client = dist.TCPStore(
        place.address, place.port, None, is_master=False, timeout=timedelta(seconds=20)
    )
    number = next(_channels)  # ranks open equally many
    return dist.PrefixStore(f"{_starts[place][1]}/channel/{number}", client)


_met: dict[Place, dist.Store] = {}
"""Where ranks have met before their group; the group takes over from there."""


def met_before(place: Place, store: dist.Store) -> None:
    """The next `meeting_point` of this process is `store`, in which all ranks are already."""
    _met[place] = store


def _connected(place: Place, deadline: float) -> dist.Store:
    held_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    holds = place.rank == 0 and not held_by_torchrun
    where = f"{place.address}:{place.port}"
    while True:
        left = max(deadline - time.monotonic(), 1.0)
        try:
            return dist.TCPStore(
                place.address,
                place.port,
                place.world_size,
                is_master=holds,
                timeout=timedelta(seconds=min(left, SAY_EVERY_SECONDS)),
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=_listening(place) if holds else None,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            if holds:
                raise ConfigError(_why_not_held(place, str(error))) from error
            if time.monotonic() >= deadline:
                raise ConfigError(f"rank {place.rank} reached nobody at {where}") from error
            _say(f"rank {place.rank} on {socket.gethostname()} waits for rank 0 at {where}")


def _listening(place: Place) -> int | None:
    """A socket that only this host reaches, where the address says that no other host is meant.

    Torch's own listens on all interfaces, as does this where the address may mean another host, or
    the port is taken (perhaps by this process, whose server is then used again).
    """
    if not (place.address == "localhost" or place.address.startswith("127.")):
        return None
    address = "127.0.0.1" if place.address == "localhost" else place.address
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address, place.port))
        except OSError:
            return None
        listening.listen(4096)
        return listening.detach()


def _why_not_held(place: Place, error: str) -> str:
    if "EADDRINUSE" in error or "in use" in error:
        return (
            f"port {place.port} (MASTER_PORT) is taken on this host, perhaps by another run; "
            "choose another one: --master_port for deepspeed and torchrun"
        )
    return f"rank 0 can't listen at {place.address}:{place.port}: {error.splitlines()[0]}"


def _attempt(store: dist.Store, place: Place, deadline: float) -> str:
    """The prefix of this start, once all of its ranks are there.

    torchrun restarts ranks on a server that may remember those before them, and each host counts
    its restarts by itself. So rank 0 names the start, and tells it to each rank under a word that
    this rank has drawn.
    """
    word = secrets.token_hex(8)
    store.set(f"hello/{place.rank}", word)
    if place.rank == 0:
        return _welcome_all(store, place, deadline)
    _wait_for(store, f"welcome/{word}", place, deadline)
    prefix = store.get(f"welcome/{word}").decode()
    store.set(f"{prefix}/here/{place.rank}", socket.gethostname())
    _wait_for(store, f"{prefix}/all", place, deadline)
    return prefix


def _welcome_all(store: dist.Store, place: Place, deadline: float) -> str:
    prefix, said_at = f"trainer/{store.add('starts', 1)}", time.monotonic()
    store.set(f"{prefix}/here/0", socket.gethostname())
    missing, answered = list(range(1, place.world_size)), set[bytes]()
    while missing := [rank for rank in missing if not store.check([f"{prefix}/here/{rank}"])]:
        for key in (f"hello/{rank}" for rank in missing):
            if store.check([key]) and (word := store.get(key)) not in answered:
                answered.add(word)
                store.set(f"welcome/{word.decode()}", prefix)
        now = time.monotonic()
        if now - said_at >= SAY_EVERY_SECONDS or now >= deadline:
            said_at = now
            names = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
            if now >= deadline:
                raise ConfigError(f"ranks {names} of {place.world_size} did not come")
            _say(f"rank 0 waits for ranks {names} of {place.world_size}")
        time.sleep(0.05)
    store.set(f"{prefix}/all", "")
    return prefix


def _wait_for(store: dist.Store, key: str, place: Place, deadline: float) -> None:
    while not store.check([key]):
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"rank {place.rank}: not all of {place.world_size} ranks came in time"
            )
        time.sleep(0.05)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _number(values: Mapping[str, str], name: str, at_least: int) -> int:
    text = values.get(name)
    if text is None:
        raise ConfigError(f"{name} is not set, though others of a launcher's are; {_HOW}")
    try:
        value = int(text)
    except ValueError:
        value = at_least - 1
    if value < at_least:
        raise ConfigError(
            f"{name} is {text!r}, and a whole number of at least {at_least} is needed"
        )
    return value


def _refuse_unlaunched(environment: Mapping[str, str]) -> None:
    """A ConfigError in one of several tasks that nobody has told its rank."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        tasks = environment.get(name, "")
        if tasks.isdigit() and int(tasks) > 1:
            raise ConfigError(
                f"{name} is {tasks}, but no RANK is set: {tasks} runs would start; {_HOW}"
            )
