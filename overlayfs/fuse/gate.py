"""The gate at which a commit holds new changes.

Every handler that may change the stack runs inside `async with gate.change()`. `close` waits until the
running changes are done and makes later ones wait until `open`. A change must not enter the gate twice:
the inner entry would wait for a closer that waits for the outer one.

What takes long within a change, copying a large file, is done inside `async with gate.heavy()`. `close` lets
the running ones end first, while everything else goes on, and keeps new ones waiting outside the gate: so
nobody but who copies ever waits for a copy.
"""

from types import TracebackType

import trio


class Gate:
    """A door for changes: open at first; reads never pass through it."""

    def __init__(self) -> None:
        self.closed = False  # new changes have to wait
        self._running = 0
        self._opened: trio.Event | None = None  # exists while the gate is closed
        self._quiet: trio.Event | None = None  # exists while a closer waits for running changes
        self._light: trio.Event | None = None  # exists while heavy work must not begin
        self._copied: trio.Event | None = None  # exists while a closer waits for running heavy work
        self._heavy = 0
        self._change = _Change(self)
        self._heavy_work = _Heavy(self)

    def change(self) -> "_Change":
        """Return the context of one change; entering it waits while the gate is closed."""
        return self._change

    def heavy(self) -> "_Heavy":
        """Return the context of long work within a change. Entering it tells whether the change had to step outside.

        Then anything may have happened, a commit too, and what is to be done must be worked out anew.
        """
        return self._heavy_work

    async def close(self) -> None:
        """Hold new changes and return when no change is running; a second closer waits for the first."""
        while self._light is not None:
            await self._light.wait()
        self._light = trio.Event()
        try:
            await self._wait_copied()
            self._opened = trio.Event()
            self.closed = True
            await self._wait_quiet()
        except BaseException:
            self.open()
            raise

    def open(self) -> None:
        """Let the waiting changes go on."""
        if self._opened is not None:
            self._opened.set()
            self._opened = None
            self.closed = False
        if self._light is not None:
            self._light.set()
            self._light = None

    async def _wait_copied(self) -> None:
        if not self._heavy:
            return
        self._copied = trio.Event()
        try:
            await self._copied.wait()
        finally:
            self._copied = None

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

    async def _begin_heavy(self) -> bool:
        stepped_out = False
        while self._light is not None:
            stepped_out = True
            await self._wait_outside(self._light)
        self._heavy += 1
        return stepped_out

    async def _wait_outside(self, until: trio.Event) -> None:
        """Let a closer go on meanwhile; the change is inside again afterwards, however this ends."""
        self._leave()
        try:
            await until.wait()
            while self._opened is not None:
                await self._opened.wait()
        finally:
            self._running += 1

    def _end_heavy(self) -> None:
        self._heavy -= 1
        if not self._heavy and self._copied is not None:
            self._copied.set()


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


class _Heavy:
    """The context of long work within a change; shared by all, too."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def __aenter__(self) -> bool:
        return await self._gate._begin_heavy()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gate._end_heavy()
