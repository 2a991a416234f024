"""The same random operations on our tree and on the kernel's overlayfs give the same results; then they swap uppers."""

import copy
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.differential.operations import Generator, Operation
from tests.support.drivers import Tree
from tests.support.drivers.mounts import KernelOverlay
from tests.support.dump import Dump, differences, dump
from tests.support.stacks import StackMaker, stack_maker

pytestmark = pytest.mark.on("fuse")

SEEDS = int(os.environ.get("OVERLAYFS_DIFFERENTIAL_SEEDS", "25"))
FIRST = int(os.environ.get("OVERLAYFS_DIFFERENTIAL_FIRST", "0"))
STEPS = 120


@pytest.fixture
def makers(driver: str, place: Path) -> Iterator[tuple[StackMaker, StackMaker]]:
    """A maker for our driver and one for the kernel."""
    with ExitStack() as after:
        yield (
            after.enter_context(stack_maker(driver, place / "ours", StackMaker)),
            after.enter_context(stack_maker("kernel", place / "kernel", StackMaker)),
        )


def compared(ours: Tree, theirs: Tree, start: int) -> list[str]:
    """Where the trees differ; times of what the test touched are not compared."""
    left, right = dump(ours, times_before=start), dump(theirs, times_before=start)
    return differences(forgiven(left, right), right)


def forgiven(left: Dump, right: Dump) -> Dump:
    """Our dump without the times of directories that the kernel has touched, as it does even when a rename fails."""
    late = {path for path, item in right.items() if item.kind == "dir" and item.mtime_ns == -1}
    return {path: item._replace(mtime_ns=-1) if path in late else item for path, item in left.items()}


def run_both(ours: Tree, theirs: Tree, steps: list[Operation]) -> list[str]:
    """Run each operation on both; return a line for each that differs."""
    lines = []
    for number, step in enumerate(steps):
        left, right = step.run(ours), step.run(theirs)
        if left != right:
            lines.append(f"step {number}: {step}: ours {left!r}, kernel {right!r}")
    return lines


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_alike(makers: tuple[StackMaker, StackMaker], seed: int) -> None:
    start = time.time_ns() - 10**9
    generator = Generator(seed)
    layers = generator.layers()
    ours, theirs = makers[0](*layers), makers[1](*layers)
    assert not compared(ours, theirs, start)
    for _ in range(3):
        steps = [generator.operation() for _ in range(STEPS // 3)]
        lines = run_both(ours, theirs, steps)
        lines += compared(ours, theirs, start)
        assert not lines, f"seed {seed}:\n" + "\n".join(lines)
        ours.remount()
        theirs.remount()
    compare_commits(ours)
    swap(ours, theirs)


def compare_commits(ours: Tree) -> None:
    """The upper as a layer over the same layers, mounted by the kernel and by us, shows what the mount showed."""
    before = dump(ours)
    view = copy.copy(ours.stack)
    layer = view.next_layer()
    ours.commit(layer)
    view.lower = [layer, *view.lower]
    view.upper = view.work = None
    view.mountpoint = view.base / "view"
    view.mountpoint.mkdir()
    for kind in (KernelOverlay, type(ours)):
        mounted = kind(view)
        try:
            lines = differences(before, dump(mounted))
        finally:
            mounted.close()
        assert not lines, f"committed, mounted by {kind.name}:\n" + "\n".join(lines)


def swap(ours: Tree, theirs: Tree) -> None:
    """Each driver mounts the upper that the other has written, and must show the same tree."""
    left, right = dump(ours), dump(theirs)
    ours.close()
    theirs.close()
    kernel = KernelOverlay(ours.stack)
    try:
        crossed = differences(left, dump(kernel))
    finally:
        kernel.close()
    mine = type(ours)(theirs.stack)
    try:
        crossed += differences(right, dump(mine))
    finally:
        mine.close()
    assert not crossed, "after swapping the uppers (left: its writer):\n" + "\n".join(crossed)
