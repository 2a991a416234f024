"""The gate at which a commit holds new changes.

Every handler that may change the stack runs inside `async with gate.change()`. `close` waits until the
running changes are done and makes later ones wait until `open`. A change must not enter the gate twice:
the inner entry would wait for a closer that waits for the outer one.
"""

from types import TracebackType

import trio


class Gate:
    """A door for changes: open at first; reads never pass through it."""

    def __init__(self) -> None:
        self._running = 0
        self._opened: trio.Event | None = None  # exists while the gate is closed
        self._quiet: trio.Event | None = None  # exists while a closer waits for running changes
        self._change = _Change(self)

    @property
    def closed(self) -> bool:
        """Whether new changes have to wait."""
        return self._opened is not None

    def change(self) -> "_Change":
        """Return the context of one change; entering it waits while the gate is closed."""
        return self._change

    async def close(self) -> None:
        """Hold new changes and return when no change is running; a second closer waits for the first."""
        while self._opened is not None:
            await self._opened.wait()
        self._opened = trio.Event()
        try:
            await self._wait_quiet()
        except BaseException:
            self.open()
            raise

    def open(self) -> None:
        """Let the waiting changes go on."""
        if self._opened is not None:
            self._opened.set()
            self._opened = None

    async def _wait_quiet(self) -> None:
        if not self._running:
            return
        self._quiet = trio.Event()
        try:
            await self._quiet.wait()
        finally:
            self._quiet = None

    async def _enter(self) -> None:
        while self._opened is not None:
            await self._opened.wait()
        self._running += 1

    def _leave(self) -> None:
        self._running -= 1
        if not self._running and self._quiet is not None:
            self._quiet.set()


class _Change:
    """The context of a change. It keeps nothing of its own, so that all changes share one object."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def __aenter__(self) -> None:
        await self._gate._enter()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gate._leave()
