"""A mount under a mixed load for a given time, and what it leaks: `python -m tests.mounted.soak --seconds N`.

The load varies and leaves nothing behind, so anything that grows is a leak: memory, descriptors, Python objects, nodes.
At the end nothing is open, the kernel drops its caches, and the daemon must count no look-up.
"""

import argparse
import gc
import json
import mmap
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from overlayfs.fs.nodes import ROOT_NUMBER
from overlayfs.mount import control_client, control_server
from overlayfs.mount.control_protocol import StatsReply
from tests.support import engines
from tests.support.drivers import Stack
from tests.support.drivers.forked import ForkedMount, load
from tests.support.polling import until
from tests.support.spec import Tree as Spec

WORKERS = 3
DIRECTORIES, FILES = 10, 40
PERIOD = 1.0  # seconds between two samples
KEPT_IDLE = 1024  # nodes that the daemon keeps although the kernel has forgotten them (overlayfs/fs/nodes.py)
SPARE, SPARE_OBJECTS = 8, 200  # descriptors and objects that come and go with the threads of a daemon
SETTLING = 0.25  # fraction of the time in which caches fill
LAYER: Spec = {
    f"d{number}": {**{f"f{file}": b"%d" % file * 200 for file in range(FILES)}, "sub": {"leaf": b"leaf"}}
    for number in range(DIRECTORIES)
}


class Held(NamedTuple):
    """What a daemon uses: descriptors, KiB of memory, garbage-collected Python objects, nodes, nodes that the kernel
    knows, and open handles."""

    descriptors: int
    memory: int
    objects: int
    nodes: int
    known: int
    handles: int


@contextmanager
def reporting() -> Iterator[None]:
    """Daemons that are forked within this context reply to `stats` with what they use."""

    async def stats(self: control_server.ControlServer, _: object) -> StatsReply:
        nodes = list(self._overlay.nodes)
        gc.collect()
        found = {
            "objects": len(gc.get_objects()),
            "nodes": len(nodes),
            "known": sum(node.lookups > 0 for node in nodes if node.number != ROOT_NUMBER),
            "handles": sum(node.handles for node in nodes),
            "requests": sum(self._engine.counters.values()),
        }
        return StatsReply(engine=self._engine.name, uptime=0.0, requests=found)

    with mock.patch.object(control_server.ControlServer, "_stats", stats):
        yield


class Soaked:
    """A mount and its load."""

    def __init__(self, place: Path, engine: str) -> None:
        load()
        with reporting():
            self.tree = ForkedMount(Stack(place / "s", [{}, LAYER], {}), {"engine": engine})
        self.point = self.tree.stack.mountpoint

    def stats(self) -> dict[str, int]:
        """The daemon's reply to `stats`."""
        return control_client.Client.at(os.fsencode(self.point)).stats().requests

    def held(self) -> Held:
        """Return what the daemon uses now."""
        found, pid = self.stats(), self.tree.daemon
        status = Path(f"/proc/{pid}/status").read_text()
        memory = int(status.partition("VmRSS:")[2].split()[0])
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        return Held(descriptors, memory, found["objects"], found["nodes"], found["known"], found["handles"])

    def end(self) -> None:
        """Unmount."""
        self.tree.close()
        self.tree.stack.check()


# --- the load ----------------------------------------------------------------------------------------------


def turn(point: Path, worker: int, number: int) -> None:
    """Make every kind of request, in a directory of this worker and in shared ones; leave nothing behind."""
    own = point / f"own{worker}"
    own.mkdir()
    _files(own)
    _names(own)
    _shared(point / f"d{number % DIRECTORIES}", worker)
    for path in own.iterdir():
        path.unlink()
    own.rmdir()


def _files(own: Path) -> None:
    for number in range(10):
        (own / f"n{number}").write_bytes(b"x" * 5000)
    with (own / "n0").open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 5000) as memory:
        memory[0:4] = b"yyyy"
        memory.flush()
        os.truncate(own / "n0", 4000)
        os.fsync(file.fileno())
    with (own / "n1").open("r+b", buffering=0) as file:
        (own / "n1").unlink()
        file.write(b"z")
        os.fchmod(file.fileno(), 0o600)
    with (own / "n2").open("ab") as log, (own / "n2").open("rb") as reader:
        log.write(b"more")
        reader.read()


def _names(own: Path) -> None:
    os.link(own / "n3", own / "link")
    os.symlink("n3", own / "symlink")
    os.mkfifo(own / "fifo")
    os.rename(own / "n4", own / "n5")
    os.setxattr(own / "n5", "user.a", b"1")
    os.removexattr(own / "n5", "user.a")
    (own / "sub").mkdir()
    os.rename(own / "n6", own / "sub" / "n6")
    assert os.listdir(own / "sub") == ["n6"]
    (own / "sub" / "n6").unlink()
    (own / "sub").rmdir()
    with suppress(FileNotFoundError):
        os.stat(own / "absent")


def _shared(directory: Path, worker: int) -> None:
    """Work in a shared directory, where workers may make each other's calls fail."""
    path, moved = directory / f"f{worker}", directory / "moved"
    acts: list[Callable[[], object]] = [
        lambda: [each.stat() for each in directory.iterdir()],
        lambda: path.chmod(0o600),
        lambda: path.write_bytes(b"new"),
        lambda: path.rename(moved),
        lambda: moved.rename(path),
        lambda: (directory / "sub").rename(directory / "sub2"),
        lambda: (directory / "sub2").rename(directory / "sub"),
        (directory / "sub" / "leaf").read_bytes,
    ]
    for act in acts:
        with suppress(OSError):
            act()


def _work(point: Path, worker: int, ended: Event) -> None:
    number = 0
    while not ended.is_set():
        turn(point, worker, number)
        number += 1


@contextmanager
def working(point: Path) -> Iterator[None]:
    """Run the load in other processes within this context."""
    context = multiprocessing.get_context("fork")
    ended = context.Event()
    workers = [context.Process(target=_work, args=(point, number, ended)) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        ended.set()
        for worker in workers:
            worker.join()
    assert not any(worker.exitcode for worker in workers), "a worker has failed"


# --- leaks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """The results of one soak, by the names of `Held`: growth per hour once caches are full; use before and after."""

    engine: str
    seconds: int
    requests: int
    growth: dict[str, float]
    before: dict[str, int]
    left: dict[str, int]

    def wrong(self) -> list[str]:
        """What has certainly leaked. Memory is left out: in a short soak the allocator's behaviour dominates."""
        more = {name: self.left[name] - self.before[name] for name in Held._fields}
        checks = {
            f"{self.left['known']} nodes that the kernel has not forgotten": not self.left["known"],
            f"{more['handles']} more handles": not more["handles"],
            f"{self.left['nodes']} nodes": self.left["nodes"] <= KEPT_IDLE + 1,
            f"{more['descriptors']} more descriptors": more["descriptors"] <= SPARE,
            f"{more['objects']} more objects": more["objects"] <= SPARE_OBJECTS,
        }
        return [word for word, holds in checks.items() if not holds]


def soak(soaked: Soaked, engine: str, seconds: float) -> Findings:
    """Work for some time and sample the daemon's use of resources."""
    for number in range(DIRECTORIES):  # the daemon keeps directories open, so it opens all of them first
        turn(soaked.point, 0, number)
    before, began = soaked.held(), time.monotonic()
    samples: list[tuple[float, Held]] = []
    with working(soaked.point):
        while time.monotonic() - began < seconds:
            time.sleep(PERIOD)
            samples.append((time.monotonic() - began, soaked.held()))
    requests = soaked.stats()["requests"]
    forget(soaked)
    settled = [sample for sample in samples if sample[0] > seconds * SETTLING]
    growth = {name: slope([(at, getattr(held, name)) for at, held in settled]) * 3600 for name in Held._fields}
    return Findings(engine, round(seconds), requests, growth, before._asdict(), soaked.held()._asdict())


def forget(soaked: Soaked) -> None:
    """Make the kernel forget every name of the mount; return when the daemon has been notified."""
    for _ in range(3):
        Path("/proc/sys/vm/drop_caches").write_text("2")
    with suppress(AssertionError):  # the caller reports what is left
        until(lambda: not soaked.held().known)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the line through the points, by least squares; 0 for fewer than two."""
    if len(points) < 2:
        return 0.0
    x, y = sum(at for at, _ in points) / len(points), sum(value for _, value in points) / len(points)
    above = sum((at - x) * (value - y) for at, value in points)
    return above / sum((at - x) ** 2 for at, _ in points)


def main() -> int:
    """Soak as the command line says; return 1 if something has leaked."""
    parser = argparse.ArgumentParser(prog="python -m tests.mounted.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=engines.NAMES, default=engines.KERNEL)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--place", type=Path, default="/dev/shm", help="directory for the layers (default: in memory)")
    parser.add_argument("--record", type=Path, help="append the line of figures to this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ofs-soak-", dir=given.place) as place:
        soaked = Soaked(Path(place), given.engine)
        try:
            found = soak(soaked, given.engine, given.seconds)
            soaked.end()
        finally:
            soaked.tree.kill()
    line = json.dumps(asdict(found))
    print(line, *found.wrong(), sep="\n")
    if given.record:
        with given.record.open("a") as file:
            file.write(f"{line}\n")
    return int(bool(found.wrong()))


if __name__ == "__main__":
    sys.exit(main())
