"""T19: work on a mount leaks nothing in the daemon. For longer runs: tests.mounted.soak."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.mounted.soak import DIRECTORIES, SPARE, SPARE_OBJECTS, Held, Soaked, soak, turn
from tests.support import engines
from tests.support.campaign import Campaign
from tests.support.mutants import seeded
from tests.support.mutants.together import DEAF
from tests.support.polling import LIMIT, until
from tests.support.requirements import need, need_root

SPARE_MEMORY = 4096  # KiB that the allocator may keep


@pytest.fixture
def make_soaked() -> Iterator[Callable[[], Soaked]]:
    """Factory of a mount that reports what it uses; in memory, where inode numbers are not reused."""
    need_root()
    need(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    with ExitStack() as made:
        place = Path(made.enter_context(tempfile.TemporaryDirectory(prefix="ofs-", dir="/dev/shm")))

        def make() -> Soaked:
            soaked = Soaked(place, engines.current())
            made.callback(soaked.tree.kill)
            return soaked

        yield make


def leaks(soaked: Soaked, turns: int, limit: float = LIMIT) -> list[str]:
    """Return what a mount uses after some turns and did not use before them."""
    for number in range(DIRECTORIES):
        turn(soaked.point, 0, number)
    before = soaked.held()
    for number in range(turns):
        turn(soaked.point, 0, number)
    with suppress(AssertionError):  # the kernel forgets nodes later
        until(lambda: not _more(before, soaked.held()), limit)
    return _more(before, soaked.held())


def _more(before: Held, after: Held) -> list[str]:
    spare = {"descriptors": SPARE, "objects": SPARE_OBJECTS, "memory": SPARE_MEMORY}
    counts = zip(Held._fields, before, after, strict=True)
    return [f"{name}: {now}, and {was} before" for name, was, now in counts if now > was + spare.get(name, 0)]


@pytest.mark.campaign("T19")
def test_work_leaves_nothing_open_or_allocated(make_soaked: Callable[[], Soaked], campaign: Campaign) -> None:
    turns = campaign.size(150, 1000)
    wrong = leaks(make_soaked(), turns)
    campaign.held(f"turns of work after which a mount holds what it held, engine {engines.current()}", turns, wrong)


@pytest.mark.campaign("T19")
def test_soak(make_soaked: Callable[[], Soaked], campaign: Campaign) -> None:
    """Several processes work; in the end the kernel forgets all nodes."""
    soaked = make_soaked()
    found = soak(soaked, engines.current(), campaign.size(3, 120))
    soaked.end()
    growth = ", ".join(f"{found.growth[name]:+.0f} {name}" for name in ("descriptors", "nodes"))
    what = f"requests in {found.seconds} s of soak, engine {found.engine}; {growth} an hour"
    campaign.held(what, found.requests, found.wrong())


@pytest.mark.campaign("T19")
def test_mutant(make_soaked: Callable[[], Soaked], campaign: Campaign) -> None:
    with seeded(DEAF):
        soaked = make_soaked()
    campaign.caught(f"{DEAF}, engine {engines.current()}", 1, leaks(soaked, 1, limit=1))
