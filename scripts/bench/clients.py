"""Several clients at once: the same mix of calls in several processes, each in its own directory."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from bench.workload import Trial, Workload, expect

GROUP = "scale"
CLIENTS = (1, 2, 4, 8)
TURNS = 400  # of each client


def client(place: Path, readable: list[str]) -> None:
    """Create, write, look, read a lower file, miss, rename and remove, so many times."""
    data = b"x" * 4096
    for turn in range(TURNS):
        path = place / f"new{turn}"
        with open(path, "wb", buffering=0) as file:
            file.write(data)
        expect(os.stat(path).st_size == len(data), "a new file has the wrong size")
        with open(readable[turn % len(readable)], "rb", buffering=0) as file:
            file.read()
        expect(not os.path.exists(place / f"absent{turn}"), "a name exists that no client made")
        os.rename(path, place / "renamed")
        os.unlink(place / "renamed")


def together(trial: Trial, count: int) -> None:
    """Run so many clients at once; the value is the turns per second of all together."""
    readable = [os.fspath(path) for path in sorted(trial.path("tree").rglob("f*.txt"))[:50]]
    waiting, gate = os.pipe()
    children = []
    for number in range(count):
        place = trial.path(f"client{number}")
        place.mkdir()
        children.append(_client_process(place, readable, waiting, gate))
    begun = time.perf_counter()
    os.close(gate)
    codes = [os.waitpid(child, 0)[1] for child in children]
    trial.value = count * TURNS / (time.perf_counter() - begun)
    os.close(waiting)
    expect(not any(codes), "a client has failed")


def _client_process(place: Path, readable: list[str], waiting: int, gate: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.close(gate)  # only the parent's end stays open: closing it is the signal to begin
        os.read(waiting, 1)
        client(place, readable)
        code = 0
    finally:
        os._exit(code)


def all_clean(count: int) -> Callable[[Trial], None]:
    """Return a check that every client has left its directory empty."""
    return lambda trial: expect(
        all(not os.listdir(trial.path(f"client{number}")) for number in range(count)), "a client has left files"
    )


def _workload(count: int) -> Workload:
    return Workload(
        f"{count} client{'s' * (count > 1)}",
        GROUP,
        "tree",
        lambda trial: together(trial, count),
        all_clean(count),
        copies_up=False,
        unit="turns/s",
        more_is_better=True,
    )


WORKLOADS = tuple(_workload(count) for count in CLIENTS)
