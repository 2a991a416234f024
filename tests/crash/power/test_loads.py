"""T4: the power fails while programs work in a mount; what was made durable is there, the rest is old or new."""

import pytest

from tests.crash.power.conftest import Memory
from tests.crash.power.loads import Load
from tests.crash.power.session import (
    Verdict,
    fuse_overlayfs,
    kernel_overlay,
    mutant,
    ours,
    power_cuts,
)
from tests.crash.power.sixteen import Sixteen
from tests.support.campaign import Campaign
from tests.support.engines import NAMES
from tests.support.requirements import need_program
from tests.support.watched import KINDS

TOGETHER = 8  # loads on one disk: more would make each state slow to rebuild
PEERS = {"kernel overlayfs": kernel_overlay, "fuse-overlayfs": fuse_overlayfs}

pytestmark = [pytest.mark.campaign("T4"), pytest.mark.timeout(1200)]


@pytest.mark.parametrize("kind", KINDS)
def test_short_loads(campaign: Campaign, memory: Memory, kind: str) -> None:
    """Loads from a seed, by both engines, with the lower layer on the same disk and beside it."""
    found = Verdict()
    seeds = range(campaign.size(2, 104))
    for number, first in enumerate(seeds[::TOGETHER]):
        loads = [Load(seed) for seed in seeds[first : first + TOGETHER]]
        mounter = ours(f"engine={NAMES[number % 2]}")
        found.add(power_cuts(kind, memory.fresh(), loads, mounter, shares=number % 4 > 1))
    campaign.held(f"short loads on {kind}", found.states, found.violations, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_copies(campaign: Campaign, memory: Memory, kind: str) -> None:
    """One byte changed in each of sixteen lower files, of which the upper holds nothing, or the metadata already."""
    found = Verdict()
    for prepared in (False, True)[: campaign.size(1, 2)]:
        found.add(power_cuts(kind, memory.fresh(), [Sixteen(prepared)], ours(), every=campaign.size(8, 1)))
    campaign.held(f"sixteen copies on {kind}", found.states, found.violations)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_copies_by_peers(campaign: Campaign, memory: Memory, kind: str, peer: str) -> None:
    """The same load on comparable file systems, in the full run only."""
    if not campaign.full:
        return
    need_program("fuse-overlayfs")
    found = power_cuts(kind, memory.fresh(), [Sixteen()], PEERS[peer])
    print(f"sixteen copies on {kind} by {peer}: {len(found.violations)} of {found.states} states are wrong")
    campaign.peer(peer, f"sixteen copies on {kind}", found.states, len(found.violations))


@pytest.mark.parametrize(("name", "prepared"), [("M1", False), ("M6", True)])
def test_mutants_are_noticed(campaign: Campaign, memory: Memory, name: str, prepared: bool) -> None:
    """A copy-up that syncs nothing, and one that makes its record durable before the data."""
    found = power_cuts("ext4", memory.fresh(), [Sixteen(prepared)], mutant(name), every=campaign.size(8, 1))
    campaign.caught(name, found.states, found.violations)
