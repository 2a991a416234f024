"""Regressions found by power cuts: each load here lost something once."""

from collections.abc import Iterator

import pytest

from tests.crash.power import loads
from tests.crash.power.conftest import Memory
from tests.crash.power.history import Reference
from tests.crash.power.session import ours, power_cuts
from tests.crash.power.steps import Step


class Script(loads.Load):
    """A load whose steps are known."""

    def __init__(self, name: str, *steps: Step) -> None:
        super().__init__(0)
        self.name = name.replace(" ", "-")
        self._steps = steps

    def run(self, reference: Reference) -> Iterator[Step]:
        """Yield the steps."""
        for step in (*self._steps, Step("sync", "")):
            reference.perform(step)
            yield step


FOUND = {
    "ext4": [
        # Readers of a metadata-only copy have the lower file open, and that was what fsync made durable.
        Script("attribute", Step("fsync-dir", ""), Step("setxattr", "meta", tag=1), Step("fsync", "meta")),
        # The metacopy attribute is removed once the data is copied: fdatasync does not sync that on ext4.
        Script(
            "first write",
            Step("create", "n1"),
            Step("fsync-dir", ""),
            Step("write", "meta", at=100, size=1, tag=1),
            Step("fdatasync", "meta"),
        ),
    ],
    "btrfs": [
        # The name of a new inode is made durable without its size, which a metadata-only copy has from the start.
        Script("size", Step("chmod", "small", size=0o711), Step("fsync-dir", "")),
        # The new name of a file was made durable without the whiteout under the old one: it showed twice,
        Script("rename", Step("rename", "empty", "bare/n5"), Step("fsync", "bare/n5")),
        # also when the daemon itself synced, in the middle of a first write.
        Script("rename and write", Step("rename", "big", "made/n4"), Step("fdatasync", "made/n4")),
        # After an exchange one of the two was lost and the other one was there twice.
        Script("exchange", Step("exchange", "two", "t/s"), Step("fsync-writer", "t/s")),
    ],
}


@pytest.mark.parametrize("kind", FOUND)
def test_nothing_is_lost_or_doubled(memory: Memory, kind: str) -> None:
    found = power_cuts(kind, memory.fresh(), FOUND[kind], ours())
    assert found.states > 20
    assert not found.violations, "\n".join(found.violations)
