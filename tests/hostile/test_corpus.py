"""T13: hostile layers and archives do no harm, whichever action is run on them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.corpus import CORPUS
from tests.hostile.trial import ACTIONS, MODULES, Trial
from tests.support import engines
from tests.support.campaign import Campaign
from tests.support.fork_server import ForkServer
from tests.support.requirements import need_root

pytestmark = pytest.mark.root
LINKED = (12, 13, 14, 16, 20)
"""Entries that lead outside where a path is followed."""


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    """Runs the actions in processes."""
    need_root()
    with ForkServer(*MODULES) as started:
        yield started


@pytest.fixture
def make_trial(campaign: Campaign, fork_server: ForkServer, place: Path) -> Callable[..., Trial]:
    """A function that makes trials of the size of this run."""

    def make(engine: str, mutant: str | None = None) -> Trial:
        (place / engine).mkdir()
        every = campaign.full and engine == engines.current()
        return Trial(place / engine, fork_server, engine, campaign.full, every, mutant)

    return make


@pytest.mark.campaign("T13")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", CORPUS)
def test_nothing_outside_is_reached_and_no_process_dies(
    campaign: Campaign, make_trial: Callable[..., Trial], number: int
) -> None:
    """Five actions on each entry; a point is one action on all forms of the entry."""
    for engine in engines.NAMES if campaign.full else (engines.current(),):
        trial = make_trial(engine)
        trial.run(number)
        assert {action for _, action in trial.taken} == set(ACTIONS)
        campaign.held(f"hostile objects by five actions, engine {engine}", len(trial.taken), trial.violations)


@pytest.mark.campaign("T13")
def test_a_mutant_that_joins_paths_is_caught(campaign: Campaign, make_trial: Callable[..., Trial]) -> None:
    trial = make_trial(engines.current(), mutant="M4")
    for number in LINKED:
        trial.run(number)
    campaign.caught("M4", len(trial.taken), trial.violations)
    assert any("outside" in violation for violation in trial.violations)


def test_the_corpus_is_complete() -> None:
    assert sorted(CORPUS) == list(range(1, 45))
