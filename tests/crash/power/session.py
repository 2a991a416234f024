"""Loads on a real mount whose upper is on a recorded disk, and what power cuts at any moment leave of them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Protocol

from overlayfs import StackConfig
from tests.crash.power.history import Reference
from tests.crash.power.judge import Judge, found_things, look
from tests.crash.power.steps import Held, Step, close_all, perform
from tests.support import syscalls
from tests.support.drivers.mounts import COMMAND, unmount
from tests.support.leftovers import mounts_below
from tests.support.polling import until
from tests.support.watched import ROOT, Recording, WatchedDisk, watched
from tests.support.writelog import State

Mounter = Callable[[str, Path], list[str]]
"""Returns the command line of a mount in the foreground, from an option string and a mount point."""


def ours(extra: str = "") -> Mounter:
    """Our program, with options of the test."""
    return lambda options, point: [COMMAND, "mount", "-f", "-o", ",".join(filter(None, (options, extra))), str(point)]


def mutant(name: str) -> Mounter:
    """Our program with a deliberate bug."""
    return lambda options, point: [sys.executable, "-m", "tests.support.mutants", name, options, str(point)]


def fuse_overlayfs(options: str, point: Path) -> list[str]:
    """Debian's fuse-overlayfs."""
    return ["fuse-overlayfs", "-f", "-o", options, str(point)]


def kernel_overlay(options: str, point: Path) -> list[str]:
    """The kernel's overlayfs, which has no foreground process."""
    return ["mount", "-t", "overlay", "overlay", "-o", options, str(point)]


@contextmanager
def mounted(command: list[str], point: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A mount until the end of the block, and the process that serves it."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: process.poll() not in (None, 0) or os.path.ismount(point))
        assert process.poll() in (None, 0), f"{command} did not mount"
        yield process
    finally:
        if mounts_below(point):  # os.path.ismount says no when the root cannot be looked at
            unmount(point)
        process.wait(20)


class Program(Protocol):
    """A load before it is run: the lower layers, the preparation, and the steps."""

    @property
    def name(self) -> str:
        """The directory of the load, and what it is called in the log."""

    @property
    def setup(self) -> Sequence[Step]:
        """Steps that are durable when the load begins."""

    def build(self, base: Path) -> None:
        """Make the objects of the lower layer."""

    def run(self, reference: Reference) -> Iterator[Step]:
        """Yield each step after it was performed on the reference."""


@dataclass(frozen=True)
class Stack:
    """The places of a stack: upper and work on a disk, the lower layer there too, or next to it in `place`.

    inside: the directory of the disk that has upper and work.
    """

    place: Path
    shares: bool
    inside: str = ""

    def lower(self, disk: Path) -> Path:
        """The lower layer; on the disk the upper may share its blocks."""
        return (disk if self.shares else self.place) / "lower"

    def _upper(self, disk: Path) -> tuple[Path, Path]:
        return disk / self.inside / "up", disk / self.inside / "work"

    def options(self, disk: Path) -> str:
        """The option string of a mount."""
        upper, work = self._upper(disk)
        return f"lowerdir={self.lower(disk)},upperdir={upper},workdir={work}"

    def config(self, disk: Path) -> StackConfig:
        """The same for a use without a mount."""
        lower, upper, work = (os.fsencode(path) for path in (self.lower(disk), *self._upper(disk)))
        return StackConfig(lower=(lower,), upper=upper, work=work)

    def build(self, disk: Path, programs: Sequence[Program]) -> None:
        """Make all parts, with a directory for each load in the lower layer."""
        for path in (*self._upper(disk), self.lower(disk)):
            path.mkdir()
        for program in programs:
            (self.lower(disk) / program.name).mkdir()
            program.build(self.lower(disk) / program.name)


@dataclass(frozen=True)
class Run:
    """One load that was performed on a mount and on a reference, and noted in the log of the disk."""

    name: str
    reference: Reference


class Session:
    """Runs loads, one after the other, on one mount whose upper is on a watched disk; references are in `place`."""

    def __init__(self, disk: WatchedDisk, stack: Stack, place: Path) -> None:
        self._disk = disk
        self._stack = stack
        self._place = place
        self.point = place / "mount"
        self.point.mkdir()

    def run(self, program: Program) -> Run:
        """Perform one load."""
        reference = self._prepare(program)
        try:
            self._perform(program.name, program.run(reference))
        finally:
            reference.close()
        return Run(program.name, reference)

    def _prepare(self, program: Program) -> Reference:
        base = self._place / program.name
        subprocess.run(["cp", "-a", str(self._stack.lower(self._disk.point) / program.name), str(base)], check=True)
        for step in program.setup:
            perform(base, step, {})
            perform(self.point / program.name, step, {})
        self._sync()
        return Reference(base)

    def _perform(self, name: str, steps: Iterable[Step]) -> None:
        held: Held = {}
        self._disk.mark(f"{name} start")
        try:
            for number, step in enumerate(steps, 1):
                self._disk.mark(f"{name} {number} begun")
                perform(self.point / name, step, held)
                if step.verb == "sync":
                    self._sync()
                self._disk.mark(f"{name} {number} done")
        finally:
            close_all(held)
        self._disk.mark(f"{name} end")

    def _sync(self) -> None:
        """Sync only these two file systems, unlike sync(2)."""
        fd = os.open(self.point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            syscalls.syncfs(fd)
        finally:
            os.close(fd)
        self._disk.sync()


@dataclass
class Verdict:
    """The number of states tried, and a line for each that is wrong."""

    states: int = 0
    violations: list[str] = field(default_factory=list)

    def add(self, other: "Verdict") -> None:
        """Add the results of another group of states."""
        self.states += other.states
        self.violations += other.violations


class Replay:
    """Power cuts in loads that were recorded."""

    def __init__(self, recording: Recording, stack: Stack, random: Random) -> None:
        self._recording = recording
        self._stack = stack
        self._random = random

    def judge(self, run: Run, every: int) -> Verdict:
        """Try every state of one load, or only every n-th."""
        verdict = Verdict()
        marked = self._recording.marked
        states = self._recording.states(marked(f"{run.name} start"), marked(f"{run.name} end"), self._random)
        for state in islice(states, every // 2, None, every):
            verdict.states += 1
            wrong = self._wrong(run, state)
            if wrong:
                steps = ", ".join(map(str, run.reference.steps))
                verdict.violations.append(f"{self._recording.kind}: {steps}: {wrong}, with {state}")
        return verdict

    def _wrong(self, run: Run, state: State) -> str:
        done, begun = (self._count(run, word, state.position) for word in ("done", "begun"))
        try:
            with self._recording.after(state) as point:
                found = found_things(look(self._stack.config(point), run.name.encode()))
        except Exception as error:  # whatever prevents the next mount from showing everything
            return f"with {done} steps done: {error!r}"
        lines = Judge(run.reference, done, begun).violations(found)
        return f"with {done} of {begun} steps done: {'; '.join(lines)}" if lines else ""

    def _count(self, run: Run, word: str, position: int) -> int:
        numbers = range(1, len(run.reference.steps) + 1)
        return sum(self._recording.marked(f"{run.name} {number} {word}") < position for number in numbers)


def power_cuts(
    kind: str, memory: Path, programs: Sequence[Program], mounter: Mounter, shares: bool = False, every: int = 1
) -> Verdict:
    """Run loads on a fresh disk of this kind, then cut the power at each moment of each, or at every n-th.

    memory: an empty place. shares: the lower layer is on the same disk as the upper.
    """
    stack = Stack(memory, shares)
    with watched(kind, memory / "disk") as disk:
        stack.build(disk.point, programs)
        session = Session(disk, stack, memory)
        with mounted(mounter(stack.options(disk.point), session.point), session.point):
            runs = [session.run(program) for program in programs]
    replay = Replay(disk.recording(), stack, Random(len(programs)))
    verdict = Verdict()
    for run in runs:
        verdict.add(replay.judge(run, every))
    return verdict
