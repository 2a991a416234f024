"""What all verbs of one overlay share: the stack, the nodes, lookup, and the real objects behind nodes."""

from overlayfs.fs.config import StackConfig
from overlayfs.fs.lookup import Lookup
from overlayfs.fs.nodes import NodeTable
from overlayfs.fs.real_objects import RealObjects
from overlayfs.fs.stack import Stack
from overlayfs.tree.upper import Upper


class Core:
    """The parts of one overlay below its verbs."""

    def __init__(self, config: StackConfig) -> None:
        self.stack = Stack(config)
        self.nodes = NodeTable(config.ino32)
        self.lookup = Lookup(self.stack, self.nodes)
        self.objects = RealObjects(self.stack, self.nodes)


class Verbs:
    """A group of verbs on one overlay."""

    def __init__(self, core: Core) -> None:
        self._stack = core.stack
        self._nodes = core.nodes
        self._lookup = core.lookup
        self._objects = core.objects

    @property
    def _upper(self) -> Upper:
        """The upper; EROFS without one."""
        return self._objects.upper
