"""Nodes by node id, the number that the kernel knows them by.

A node's id is its own number until it needs a new id: an inode of the kernel cannot change the file that it reads in
passthrough, so after copy-up a new inode takes the place of the old one (docs/engine.md). Both ids lead to the same
node, with the same st_ino.
"""

import errno
import itertools

from overlayfs.errors import oserror
from overlayfs.fs.nodes import Node, NodeTable

_FIRST = 1 << 63  # no node has such a number


class NodeIds:
    """Nodes by node id, their own number or a later id, with the look-ups that the kernel has not given back."""

    def __init__(self, nodes: NodeTable) -> None:
        self._nodes = nodes
        self._later: dict[int, Node] = {}  # by later id
        self._lookups: dict[int, int] = {}  # by later id
        self.renewed: dict[int, int] = {}  # number of a node -> the later id that new look-ups get
        self._unused = itertools.count(_FIRST)

    def node(self, nodeid: int) -> Node:
        """Return the node behind a node id; ESTALE for none."""
        node = self._nodes.find(nodeid) or self._later.get(nodeid)
        if node is None:
            raise oserror(errno.ESTALE)
        return node

    def is_stale(self, nodeid: int, node: Node) -> bool:
        """Return whether a node has a later id than this one."""
        return bool(self.renewed) and self.nodeid(node) != nodeid

    def nodeid(self, node: Node) -> int:
        """Return the id by which the kernel is to know a node from now on."""
        return self.renewed.get(node.number, node.number)

    def remember(self, node: Node) -> int:
        """Count a look-up of a node and return its id."""
        self._nodes.remember(node)
        if not self.renewed:
            return node.number
        nodeid = self.nodeid(node)
        if nodeid != node.number:
            self._lookups[nodeid] += 1
        return nodeid

    def forget(self, nodeid: int, count: int) -> bool:
        """Take back look-ups; return whether the kernel has forgotten this node id (FORGET)."""
        if nodeid in self._later:
            return self._forget_later(nodeid, count)
        self._nodes.forget(nodeid, count)
        gone = not self._nodes.is_held(nodeid)
        if gone and self.renewed:
            self._discard_unused(nodeid)
        return gone

    def _forget_later(self, nodeid: int, count: int) -> bool:
        node = self._later[nodeid]
        self._lookups[nodeid] -= count
        gone = self._lookups[nodeid] <= 0
        # The kernel may give the last look-up back while it is about to make the next one: the node keeps its id.
        if gone and self.renewed.get(node.number) != nodeid:
            del self._later[nodeid], self._lookups[nodeid]
        self._nodes.forget(node.number, count)
        if not self._nodes.is_held(node.number):
            self._discard_unused(node.number)
        return gone

    def _discard_unused(self, number: int) -> None:
        """Discard the newest id of a node that the kernel has forgotten: another node may get its number."""
        nodeid = self.renewed.pop(number, None)
        if nodeid is not None:
            del self._later[nodeid], self._lookups[nodeid]

    def renew(self, node: Node) -> None:
        """Let the next look-up of a node give it a new id."""
        nodeid = next(self._unused)
        self._later[nodeid] = node
        self._lookups[nodeid] = 0
        self.renewed[node.number] = nodeid
