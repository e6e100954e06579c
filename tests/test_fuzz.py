"""Bytes that nobody wrote so: read, or refused in one sentence; what once was neither stays so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzed import TARGETS, crash_of

CRASHES: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "fixtures/crashes.json").read_text()
)
PIECES = [
    *(b"\0", b"\xff" * 8, b"{", b"[", b"]", b'"', b"null", b"1e999", b"-1", b"9" * 30, b"\\ud800"),
    *(b"NaN", b"\xef\xbb\xbf", b"~", b"!!", b"&a ", b"*a", b": ", b"\n", b"${", b"2026-01-01"),
]
"""That mean something to some reader."""
CHANGE = st.tuples(
    st.sampled_from(["flip", "cut", "put", "over", "again"]),
    st.floats(0.0, 1.0, exclude_max=True),
    st.sampled_from(PIECES) | st.binary(max_size=8),
    st.sampled_from([1, 8, 64, 512, 1 << 20]),
)


def changed(data: bytes, how: str, place: float, piece: bytes, count: int) -> bytes:
    start = int(place * (len(data) + 1))
    before, behind = data[:start], data[start:]
    match how:
        case "flip":
            return before + bytes([behind[0] ^ 1 << count % 7]) + behind[1:] if behind else data
        case "cut":
            return before + behind[count:]
        case "put":
            return before + piece + behind
        case "over":
            return before + piece + behind[len(piece) :]
    return before + behind[: min(count, 4096)] + behind


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", TARGETS)
@settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(changes=st.lists(CHANGE, min_size=1, max_size=4), is_signed=st.booleans())
def test_changed_bytes_are_read_or_refused(kind: str, changes: list, is_signed: bool) -> None:
    target = TARGETS[kind]
    data = target.example
    for change in changes:
        data = changed(data, *change)
    crash = crash_of(target, target.signed(data) if is_signed else data)
    if crash is not None:
        raise AssertionError(f"{kind}: {data.hex()}") from crash


@pytest.mark.parametrize("kind", TARGETS)
def test_the_examples_are_good_and_what_crashed_once_is_refused(kind: str) -> None:
    if TARGETS[kind].example:
        TARGETS[kind].read(TARGETS[kind].example)
    for data in map(bytes.fromhex, CRASHES.get(kind, [])):
        assert crash_of(TARGETS[kind], data) is None
