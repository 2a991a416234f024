"""Bringing nodes to the upper before a verb changes them, without stopping the loop for long copies.

The node table says what to lift next, ancestors first. Each step runs under the lock of its node: staged
in a thread when heavy, published on the loop. While a task waited for the lock another one may have done
the work, so the question is asked again inside.
"""

from collections.abc import Callable, Iterable

from overlayfs.fs.copyup import CopyUpStep, Requirement
from overlayfs.fs.nodes import Node
from overlayfs.fs.overlay import Overlay
from overlayfs.fuse.gate import Gate
from overlayfs.fuse.locks import KeyedLocks
from overlayfs.fuse.threads import Threads


class CopyUpRunner:
    """Lifts nodes of one overlay."""

    def __init__(self, overlay: Overlay, locks: KeyedLocks, threads: Threads, gate: Gate) -> None:
        self._overlay = overlay
        self._locks = locks
        self._threads = threads
        self._gate = gate

    async def copy_up(self, node: Node, requirement: Requirement) -> None:
        """Return when `node` is in the upper as far as `need` says; OSError of the layer, nothing changed.

        The caller is inside the gate, and may be led outside and in again on the way.
        """
        while step := self._overlay.next_copy_up(node, requirement):
            if step.heavy:
                async with self._gate.heavy() as stepped_out:
                    if not stepped_out:
                        await self._take(step, node, requirement)
            else:
                await self._take(step, node, requirement)

    async def _take(self, step: CopyUpStep, node: Node, requirement: Requirement) -> None:
        """Take the next step under the lock of its node, if it is still the next one then."""
        async with self._locks.hold(step.node.number):
            current = self._overlay.next_copy_up(node, requirement)
            if current is not None and current.node is step.node:
                await self._carry_out(current)

    async def copy_up_all(self, wanted: Callable[[], Iterable[tuple[Node, Requirement]]]) -> None:
        """Return when one pass over `wanted()` finds nothing to lift.

        That pass runs without a wait, so at its end, and until the caller waits, every node is where the verb
        wants it and none is being lifted by another task.
        """
        waited = True
        while waited:
            waited = False
            for node, requirement in wanted():
                if self._overlay.next_copy_up(node, requirement) is not None:
                    waited = True
                    await self.copy_up(node, requirement)

    async def _carry_out(self, step: CopyUpStep) -> None:
        try:
            step.begin()
            if step.heavy:
                await self._threads.run(step.stage)
            else:
                step.stage()
        except BaseException:
            step.abort()
            raise
        step.publish()
