"""Copying nodes up before a verb changes them, without stopping the loop for long copies.

Each step is made and carried out under the lock of its node: staged in a thread when data is copied, published on the
loop. While a task waits for the lock another one may copy the node up, so that is checked inside.
"""

from collections.abc import Callable
from typing import TypeVar

from overlayfs.fs.copyup import Requirement, Requirements, is_met
from overlayfs.fs.nodes import Node
from overlayfs.fs.overlay import Overlay
from overlayfs.fuse.gate import Gate
from overlayfs.fuse.locks import KeyedLocks
from overlayfs.fuse.threads import Threads

Required = TypeVar("Required", bound=Requirements)


class CopyUpRunner:
    """Copies up the nodes of one overlay."""

    def __init__(self, overlay: Overlay, locks: KeyedLocks, threads: Threads, gate: Gate) -> None:
        self._copyup = overlay.copyup
        self._locks = locks
        self._threads = threads
        self._gate = gate

    async def copy_up_all(self, requirements: Callable[[], Required]) -> Required:
        """Return the requirements when all are met; OSError of a layer, and nothing is changed.

        The last pass over them runs without a wait, so at its end, and until the caller waits, every node is where the
        verb requires it and none is being copied up. The caller is inside the gate, and may leave it on the way.
        """
        while True:
            required = requirements()
            waited = False
            for node, requirement in required:
                while not is_met(node, requirement):
                    waited = True
                    following = self._copyup.next_node(node)
                    needed = requirement if following is node else Requirement.METADATA
                    if not self._copyup.copies_data(following, needed):
                        await self._perform(following, needed)
                        continue
                    async with self._gate.heavy() as stepped_out:
                        if not stepped_out:
                            await self._perform(following, needed)
            if not waited:
                return required

    async def _perform(self, node: Node, requirement: Requirement) -> None:
        async with self._locks.hold(node.number):
            if is_met(node, requirement) or self._copyup.next_node(node) is not node:
                return
            step = self._copyup.step(node, requirement)
            try:
                step.begin()
                if step.copies_data:
                    await self._threads.run(step.stage)
                else:
                    step.stage()
            except BaseException:
                step.abort()
                raise
            step.publish()
