"""Nodes by the numbers that the kernel knows them by.

That number is the node's own, until a node must be known by a new one: an inode of the kernel cannot change the file
that is read past us, so after copy-up a new inode takes the place of the old one (docs/engine.md). Both lead to the
same node, with the same st_ino.
"""

import errno
import itertools

from overlayfs.errors import oserror
from overlayfs.fs.nodes import Node, NodeTable

_FIRST = 1 << 63  # no node has such a number


class NodeIds:
    """Counts what the kernel holds of each number, the nodes' own and the further ones."""

    def __init__(self, nodes: NodeTable) -> None:
        self._nodes = nodes
        self._further: dict[int, Node] = {}
        self._held: dict[int, int] = {}  # look-ups by further number
        self._current: dict[int, int] = {}  # own number -> the further one that new look-ups get
        self._spare = itertools.count(_FIRST)

    def node(self, nodeid: int) -> Node:
        """Return the node behind a number; ESTALE for none."""
        try:
            return self._nodes.get(nodeid)
        except KeyError:
            pass
        node = self._further.get(nodeid)
        if node is None:
            raise oserror(errno.ESTALE)
        return node

    def is_replaced(self, nodeid: int, node: Node) -> bool:
        """Return whether a node has a newer number than this one."""
        return bool(self._current) and self.number(node) != nodeid

    def is_renewed(self, node: Node) -> bool:
        """Return whether the kernel may know a node by several numbers, and keep attributes under each."""
        return bool(self._current) and node.number in self._current

    def number(self, node: Node) -> int:
        """Return the number by which the kernel is to know a node from now on."""
        return self._current.get(node.number, node.number)

    def remember(self, node: Node) -> int:
        """Count a look-up of a node and return its number."""
        self._nodes.remember(node)
        if not self._current:
            return node.number
        number = self.number(node)
        if number != node.number:
            self._held[number] += 1
        return number

    def forget(self, nodeid: int, count: int) -> bool:
        """Take back look-ups; return whether the kernel has let the number go."""
        if nodeid in self._further:
            return self._forget_further(nodeid, count)
        self._nodes.forget(nodeid, count)
        gone = not self._nodes.is_held(nodeid)
        if gone and self._current:
            self._discard_unused(nodeid)
        return gone

    def _forget_further(self, nodeid: int, count: int) -> bool:
        node = self._further[nodeid]
        self._held[nodeid] -= count
        gone = self._held[nodeid] <= 0
        # The kernel gives one look-up back while it is about to make the next: the number stays with its node.
        if gone and self._current.get(node.number) != nodeid:
            del self._further[nodeid], self._held[nodeid]
        self._nodes.forget(node.number, count)
        if not self._nodes.is_held(node.number):
            self._discard_unused(node.number)
        return gone

    def _discard_unused(self, own: int) -> None:
        """Take back the newest number of a node that nobody knows any more: another one may get its own."""
        number = self._current.pop(own, None)
        if number is not None:
            del self._further[number], self._held[number]

    def renew(self, node: Node) -> None:
        """Let the next look-up of a node give it a new number."""
        number = next(self._spare)
        self._further[number] = node
        self._held[number] = 0
        self._current[node.number] = number
