"""T14: a parser accepts or refuses any input, as documented, in bounded memory and time."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile import parsers, trees
from tests.hostile.parsers import Found
from tests.support.campaign import Campaign
from tests.support.disks import disk
from tests.support.fork_server import ForkServer
from tests.support.requirements import need_root

QUICK, FULL = 500, 100_000
CHUNK = 20_000
"""Inputs per seed and process."""
PATIENCE = 900.0
SEED = 1
ROOM = 64 << 20  # bytes of the disk that a parser may write to


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    """Runs the parsers in processes."""
    with ForkServer("tests.hostile.trees") as started:
        yield started


def _fuzzed(count: int, act: Callable[[int, int], Found]) -> Found:
    """Run a fuzzer on `count` inputs, with a seed for each chunk."""
    answers: Counter[str] = Counter()
    wrong: list[str] = []
    for number, begun in enumerate(range(0, count, CHUNK)):
        found = act(SEED + number, min(CHUNK, count - begun))
        answers += found.answers
        wrong += found.wrong
    return Found(answers, wrong)


@pytest.mark.campaign("T14")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", parsers.PARSERS)
def test_every_input_is_accepted_or_refused(campaign: Campaign, fork_server: ForkServer, name: str) -> None:
    count = campaign.size(QUICK, FULL)
    found = _fuzzed(count, lambda seed, some: fork_server.run(parsers.fuzz, name, seed, some, limit=PATIENCE).value)
    assert min(found.answers["taken"], found.answers["refused"]) > count // 100, "nothing of it is tested"
    campaign.held(name, count, found.wrong, SEED)


ON_A_DISK = {
    "archives, unpacked": (trees.unpack, 200, FULL),
    "marks of layers, in a stack": (trees.stacks, 200, 20_000),
    "requests of the kernel": (trees.requests, QUICK, FULL),
}


@pytest.mark.root
@pytest.mark.campaign("T14")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ON_A_DISK)
def test_every_input_is_answered_on_a_disk(campaign: Campaign, fork_server: ForkServer, place: Path, name: str) -> None:
    need_root()
    act, quick, full = ON_A_DISK[name]
    count = campaign.size(quick, full)

    def on_a_disk(seed: int, some: int) -> Found:
        with disk("tmpfs", place / "disk", ROOM) as point:
            done = fork_server.run(act, str(point), seed, some, limit=PATIENCE)
        assert done.peak < parsers.MEMORY
        return done.value

    found = _fuzzed(count, on_a_disk)
    campaign.held(name, count, found.wrong, SEED)
