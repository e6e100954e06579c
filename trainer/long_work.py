"""How far long work is, how fast it goes, and how long it will take.

On a terminal one live line tells, and is gone when the work is done. Anywhere else a line is
written now and then, so that short work says nothing. Only rank 0 speaks, of its own share, and
none of its child processes does.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, TypeVar, runtime_checkable

from trainer.addresses import without_secrets
from trainer.pulse import PULSE

T = TypeVar("T")

LIVE_SECONDS, PLAIN_SECONDS = 0.25, 15.0
"""Between two looks at the line: on a terminal, and anywhere else."""


@runtime_checkable
class Outlet(Protocol):
    """Where lines go."""

    @property
    def is_live(self) -> bool:
        """Whether a line can be drawn over."""
        ...

    def line(self, text: str) -> None: ...

    def live(self, text: str) -> None:
        """Draw the line that moves; an empty one takes it away."""
        ...


class Standard:
    """Standard output, a terminal or not."""

    @property
    def is_live(self) -> bool:
        return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def line(self, text: str) -> None:
        text = without_secrets(text)
        sys.stdout.write(f"\r\x1b[K{text}\n" if self.is_live else f"{text}\n")
        sys.stdout.flush()

    def live(self, text: str) -> None:
        sys.stdout.write(f"\r\x1b[K{text}")
        sys.stdout.flush()


_outlet: list[Outlet] = [Standard()]
_listeners: list[Callable[[str], None]] = []


@contextmanager
def speaking_to(outlet: Outlet, listener: Callable[[str], None] | None = None) -> Iterator[None]:
    """Lines go to `outlet` inside, as that of a run that has a bar; `listener` hears them too."""
    heard = [] if listener is None else [listener]
    _outlet.append(outlet)
    _listeners.extend(heard)
    try:
        yield
    finally:
        _outlet.remove(outlet)
        for each in heard:
            _listeners.remove(each)


def tell(text: str) -> None:
    """One line about what begins now."""
    PULSE.beat()
    if _speaks():
        _outlet[-1].line(text)
        for listener in _listeners:
            listener(text)


class LongWork:
    """Counts what is done of something; use it as a context."""

    def __init__(self, name: str, *, total: int | None, unit: str) -> None:
        """`name` says what is done, as "embedding"; `unit` what is counted, in the plural."""
        self.name, self.total, self.unit = name, total, unit
        self.count = 0
        self._began = self._looked = time.monotonic()
        self._said = False

    def __enter__(self) -> LongWork:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not _speaks():
            return
        outlet = _outlet[-1]
        if outlet.is_live and self._said:
            outlet.live("")
        elif self._said and error is None:
            tell(f"{self.name}: {self._amount()} in {duration(self._seconds())}")

    def done(self, count: int = 1) -> None:
        self.count += count
        PULSE.beat()
        now = time.monotonic()
        if not _speaks():
            return
        outlet = _outlet[-1]
        if now - self._looked >= (LIVE_SECONDS if outlet.is_live else PLAIN_SECONDS):
            self._looked, self._said = now, True
            if outlet.is_live:
                outlet.live(str(self))
            else:
                tell(str(self))

    def __str__(self) -> str:
        """`embedding: 1,200 of 5,000 samples, 310 a second, 12 s left`."""
        rate = self.count / max(self._seconds(), 1e-9)
        parts = [f"{self.name}: {self._amount()}", f"{rate:.3g} a second"]
        if rate >= 1000:
            parts[1] = f"{rate:,.0f} a second"
        if self.total is not None and self.count:
            parts.append(f"{duration(max(self.total - self.count, 0) / rate)} left")
        return ", ".join(parts)

    def _amount(self) -> str:
        whole = "" if self.total is None else f" of {self.total:,}"
        return f"{self.count:,}{whole} {self.unit}"

    def _seconds(self) -> float:
        return time.monotonic() - self._began


def counted(
    items: Iterable[T],
    name: str,
    *,
    total: int | None,
    unit: str,
    size: Callable[[T], int] = lambda item: 1,
) -> Iterator[T]:
    """The items as they are; when the next one is asked for, `size` of the last is done."""
    with LongWork(name, total=total, unit=unit) as work:
        for item in items:
            yield item
            work.done(size(item))


def duration(seconds: float) -> str:
    """`45 s`, `2 min 10 s`, `3 h 5 min`, `2 d 4 h`."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    for size, unit, smaller_size, smaller_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit} {rest} {smaller_unit}"
    return f"{whole} s"


def _speaks() -> bool:
    main = os.environ.get("RANK", "").strip() in {"", "0"}
    return main and multiprocessing.parent_process() is None
