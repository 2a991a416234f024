"""Node ids: look-ups are counted exactly, and no node is dropped while the kernel knows it."""

import errno
import stat

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from overlayfs.fs.nodes import ROOT_NUMBER, Dir, File, Node, NodeTable
from overlayfs.fuse.kernel.node_ids import NodeIds


def table(*numbers: int) -> tuple[NodeTable, list[Node]]:
    """A table with files of these numbers."""
    nodes = NodeTable(ino32=False)
    root = Dir(ROOT_NUMBER, None, b"", True, (), False)
    nodes.add_root(root)
    files: list[Node] = [File(number, stat.S_IFREG, True, None) for number in numbers]
    for file in files:
        nodes.add(file, root, b"%d" % file.number, True)
    return nodes, files


def test_a_node_is_known_by_its_own_number_at_first() -> None:
    nodes, (node,) = table(7)
    found = NodeIds(nodes)
    assert found.remember(node) == 7 and found.node(7) is node
    assert found.forget(7, 1) is True


def test_a_renewed_node_has_two_ids_until_the_old_one_is_forgotten() -> None:
    nodes, (node,) = table(7)
    found = NodeIds(nodes)
    found.remember(node)
    assert node.number not in found.renewed and not found.is_stale(7, node)
    found.renew(node)
    new = found.remember(node)
    assert new != 7 and found.nodeid(node) == new
    assert node.number in found.renewed and found.is_stale(7, node) and not found.is_stale(new, node)
    assert found.node(7) is node and found.node(new) is node
    assert found.forget(7, 1) is False  # the node itself is known still
    assert found.forget(new, 1) is True
    with pytest.raises(OSError) as caught:
        found.node(new)
    assert caught.value.errno == errno.ESTALE


def test_the_new_id_stays_while_the_old_one_is_known() -> None:
    """After the kernel has given back the last look-up of the new id, the next one must not get the old id."""
    nodes, (node,) = table(7)
    found = NodeIds(nodes)
    found.remember(node)
    found.renew(node)
    new = found.remember(node)
    assert found.forget(new, 1) is True
    assert found.nodeid(node) == found.remember(node) == new and found.node(new) is node
    found.forget(new, 1)
    found.forget(7, 1)
    assert found.nodeid(node) == found.remember(node) == 7


def test_a_new_id_that_was_never_looked_up_is_discarded_with_its_node() -> None:
    """Otherwise the next node with the same number would be taken for this one."""
    nodes, (node,) = table(7)
    found = NodeIds(nodes)
    found.remember(node)
    found.renew(node)
    found.forget(7, 1)
    assert node.number not in found.renewed and found.remember(node) == 7


def test_an_unknown_node_id_is_stale() -> None:
    nodes, _ = table()
    with pytest.raises(OSError) as caught:
        NodeIds(nodes).node(99)
    assert caught.value.errno == errno.ESTALE


class Machine(RuleBasedStateMachine):
    """The kernel looks up, forgets in any portions, and files are renewed."""

    @initialize()
    def begin(self) -> None:
        self.nodes, self.files = table(10, 20, 30)
        self.found = NodeIds(self.nodes)
        self.held: dict[int, list[int]] = {}  # number -> [which file, look-ups]

    @rule(which=st.integers(0, 2))
    def look_up(self, which: int) -> None:
        number = self.found.remember(self.files[which])
        held = self.held.setdefault(number, [which, 0])
        assert held[0] == which, "one id for two files"
        held[1] += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        count = data.draw(st.integers(1, self.held[number][1]))
        self.held[number][1] -= count
        gone = self.found.forget(number, count)
        if self.held[number][1]:
            assert number < 100 or not gone
        else:
            del self.held[number]
            assert gone or number < 100  # a node's own number stays valid while a further one is known

    @rule(which=st.integers(0, 2))
    def renew(self, which: int) -> None:
        """As the engine does: only an id that the kernel knows is replaced."""
        if self.found.nodeid(self.files[which]) in self.held:
            self.found.renew(self.files[which])

    @invariant()
    def what_the_kernel_knows_is_there(self) -> None:
        for number, (which, _) in getattr(self, "held", {}).items():
            assert self.found.node(number) is self.files[which]

    @invariant()
    def counts_are_those_of_the_kernel(self) -> None:
        if hasattr(self, "files"):
            for which, node in enumerate(self.files):
                assert node.lookups == sum(count for kept, count in self.held.values() if kept == which)

    def teardown(self) -> None:
        if hasattr(self, "held"):
            for number, (_, count) in list(self.held.items()):
                self.found.forget(number, count)
            assert all(node.lookups == 0 for node in self.files)
            assert not self.found._lookups and not self.found._later and not self.found.renewed


Machine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
