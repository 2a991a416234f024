"""Positions in a listing stay valid while names come and go: a reader misses no name and sees none twice."""

import stat
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from overlayfs.fs import dir_offsets
from overlayfs.fs.dir_offsets import DirOffsets
from overlayfs.fs.lookup import Lookup
from overlayfs.fs.nodes import Dir, File, Node

NAMES = [b"%d" % number for number in range(8)]


class FakeLookup(Lookup):
    """A directory that the test changes."""

    def __init__(self, names: list[bytes]) -> None:
        self.names = dict.fromkeys(names)  # no other attribute of a lookup is set

    def listing(self, node: Dir) -> list[bytes]:
        return list(self.names)

    def find(self, node: Node, name: bytes) -> tuple[File, None] | None:
        return (File(int(name) + 10, stat.S_IFREG, True, None), None) if name in self.names else None


def directory(number: int = 1) -> Dir:
    """An empty directory."""
    return Dir(number, None, b"", True, (), False)


def made(*names: bytes) -> tuple[FakeLookup, DirOffsets]:
    """A directory with these names, and its offsets."""
    lookup = FakeLookup(list(names))
    return lookup, DirOffsets(lookup)


def read_all(found: DirOffsets, node: Dir, position: int = 0) -> list[bytes]:
    """The names from a position on."""
    return [child.name for child in found.read(node, position)]


def test_positions_begin_at_zero_and_continue_behind_each_name() -> None:
    _, found = made(b"1", b"2", b"3")
    node = directory()
    first, second, third = found.read(node, 0)
    assert (first.name, second.name, third.name) == (b"1", b"2", b"3")
    assert read_all(found, node, first[2]) == [b"2", b"3"]
    assert read_all(found, node, third[2]) == []


def test_a_reader_misses_nothing_while_names_vanish() -> None:
    """As rm -r does: read some names, remove them, continue."""
    lookup, found = made(*NAMES)
    node = directory()
    seen, position = [], 0
    while True:
        some = [child for child, _ in zip(found.read(node, position), range(3), strict=False)]
        if not some:
            break
        position = some[-1][2]
        for child in some:
            seen.append(child.name)
            del lookup.names[child.name]
    assert seen == NAMES and not lookup.names


def test_a_name_that_comes_back_is_last() -> None:
    lookup, found = made(b"1", b"2")
    node = directory()
    behind_first = next(iter(found.read(node, 0)))[2]
    del lookup.names[b"1"]
    assert read_all(found, node) == [b"2"]
    lookup.names[b"1"] = None
    assert read_all(found, node) == [b"2", b"1"]
    assert read_all(found, node, behind_first) == [b"2", b"1"]


def test_a_listing_of_gaps_is_restarted_and_old_positions_see_all_of_it() -> None:
    lookup, found = made()
    node = directory()
    lookup.names = {b"%d" % number: None for number in range(dir_offsets._GAPS + 2)}
    position = [child[2] for child in found.read(node, 0)][-1]
    lookup.names = {b"7": None}
    assert read_all(found, node) == [b"7"]
    assert read_all(found, node) == [b"7"]  # by now with positions beyond the old ones
    assert read_all(found, node, position - 1) == [b"7"]
    (only,) = found.read(node, 0)
    assert only[2] > position
    assert read_all(found, node, only[2]) == []


def test_a_reader_of_a_dropped_listing_sees_all_remaining_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dir_offsets, "_KEPT_NAMES", len(NAMES))
    lookup, found = made(*NAMES)
    node = directory()
    position = [child[2] for child in found.read(node, 0)][4]
    for name in NAMES[:5]:
        del lookup.names[name]
    read_all(found, directory(2))
    read_all(found, directory(3))
    assert read_all(found, node, position) == NAMES[5:]


@settings(max_examples=20)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_memory_is_bounded(order: list[int]) -> None:
    """The least recently read listings are dropped, never the one being read."""
    _, found = made(*NAMES)
    limit, dir_offsets._KEPT_NAMES = dir_offsets._KEPT_NAMES, 3 * len(NAMES)
    try:
        nodes = {number: directory(number) for number in order}
        for number in order:
            assert read_all(found, nodes[number]) == NAMES
            assert found._names == sum(len(each.names) for each in found._kept.values()) <= 3 * len(NAMES)
    finally:
        dir_offsets._KEPT_NAMES = limit


class Machine(RuleBasedStateMachine):
    """Two readers at their own pace, while names come and go.

    A name that exists from a reader's start to its end is seen once; none is seen twice unless it was absent meanwhile.
    """

    @initialize(names=st.sets(st.sampled_from(NAMES)))
    def begin(self, names: set[bytes]) -> None:
        self.lookup, self.found = made(*sorted(names))
        self.node = directory()
        self.readers: list[Any] = [self._fresh(), self._fresh()]

    def _fresh(self) -> dict[str, Any]:
        return {"position": 0, "seen": [], "steady": set(self.lookup.names), "back": set()}

    @rule(name=st.sampled_from(NAMES))
    def add(self, name: bytes) -> None:
        self.lookup.names[name] = None
        for reader in self.readers:
            reader["back"].add(name)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: bytes) -> None:
        self.lookup.names.pop(name, None)
        for reader in self.readers:
            reader["steady"].discard(name)

    @rule(which=st.integers(0, 1), count=st.integers(1, 4))
    def read(self, which: int, count: int) -> None:
        reader = self.readers[which]
        taken = [child for child, _ in zip(self.found.read(self.node, reader["position"]), range(count), strict=False)]
        for name, node, position, _ in taken:
            assert node is not None
            assert name in self.lookup.names and node.number == int(name) + 10
            assert position > reader["position"], "positions grow"
            assert name not in reader["seen"] or name in reader["back"], f"{name!r} is seen twice"
            reader["seen"].append(name)
            reader["position"] = position
        if len(taken) < count:
            assert reader["steady"] <= set(reader["seen"]), "a name was missed"
            self.readers[which] = self._fresh()

    @invariant()
    def another_reader_sees_all(self) -> None:
        if hasattr(self, "found"):
            assert sorted(read_all(self.found, self.node)) == sorted(self.lookup.names)


Machine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase


def test_nothing_is_kept_of_a_directory_that_has_left_the_table() -> None:
    """However many directories come and go, empty ones too."""
    for names in ((), NAMES):
        _, found = made(*names)
        node = directory()
        read_all(found, node)
        found.drop(node)
        found.drop(node)
        assert not found._kept
        assert found._names == 0
