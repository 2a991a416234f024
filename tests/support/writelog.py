"""The log of a watched disk: its writes, its flushes, and marks that a test sets between them.

A record is a header of 17 bytes (kind, offset, length; little-endian) and its bytes. Several processes append, each
record by one call.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

WRITE, FLUSH, MARK = b"W", b"F", b"M"
SUBSETS = 3  # random states of each epoch
_HEADER = struct.Struct("<cQQ")


@dataclass(frozen=True)
class Event:
    """One record; `offset` in bytes, `data` what was written, or the text of a mark."""

    kind: bytes
    offset: int
    data: bytes


@dataclass(frozen=True)
class State:
    """A state after a power cut: the first `settled` events of the log, and of those before `position` only `kept`.

    Only calls that returned before event number `position` of the log can have promised durability.
    """

    settled: int
    position: int
    kept: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.settled} events and writes {list(self.kept)} of those before {self.position}"


def append(log: int, kind: bytes, offset: int, data: bytes) -> None:
    """Add a record to a log that is open for appending."""
    os.writev(log, (_HEADER.pack(kind, offset, len(data)), data))


def read(log: Path) -> list[Event]:
    """Return all records."""
    return list(_records(memoryview(log.read_bytes())))


def _records(raw: memoryview) -> Iterator[Event]:
    at = 0
    while at < len(raw):
        kind, offset, length = _HEADER.unpack_from(raw, at)
        at += _HEADER.size + length
        yield Event(kind, offset, bytes(raw[at - length : at]))


def states(events: list[Event], first: int, end: int, random: Random) -> Iterator[State]:
    """Yield the states of a power cut from event `first` on and before `end`, each once, in the order of the log.

    Any of the writes since the last flush may have reached the disk; all earlier ones have. Writes, and so sectors, are
    never torn.
    """
    settled = first
    for flush in _flushes(events, first, end):
        writes = tuple(at for at in range(settled, flush) if events[at].kind == WRITE)
        for kept in dict.fromkeys((writes, *(_some(writes, random) for _ in range(SUBSETS)))):
            yield State(settled, flush, kept)
        settled = flush


def _flushes(events: list[Event], first: int, end: int) -> Iterator[int]:
    yield from (at for at in range(first, end) if events[at].kind == FLUSH)
    yield end


def _some(writes: tuple[int, ...], random: Random) -> tuple[int, ...]:
    return tuple(at for at in writes if random.random() < 0.5)
