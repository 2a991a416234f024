"""The gate at which a live commit holds back changes.

Every handler that may change the overlay runs inside `async with gate.change()`. `close` waits until the changes in
progress are done and makes later ones wait until `open`. A change must not enter the gate twice: the inner entry would
wait for the gate to open, and `close` for the outer change to end.

Work that takes long within a change, copying a large file, is done inside `async with gate.heavy()`. `close` first
waits for heavy work in progress, while all other changes continue, and lets no new heavy work begin. So only requests
that copy ever wait for a copy.
"""

from types import TracebackType

import trio


class Gate:
    """Open at first. Requests that change nothing do not pass through it."""

    def __init__(self) -> None:
        self.closed = False  # whether new changes have to wait
        self._changes = 0  # in progress
        # Each event exists only while something may wait for it.
        self._opened: trio.Event | None = None
        self._changes_done: trio.Event | None = None
        self._heavy_allowed: trio.Event | None = None
        self._heavy_done: trio.Event | None = None
        self._heavy = 0
        self._change = _Change(self)
        self._heavy_work = _Heavy(self)

    def change(self) -> "_Change":
        """Return the context of one change; entering it waits while the gate is closed."""
        return self._change

    def heavy(self) -> "_Heavy":
        """Return the context of heavy work within a change; entering it returns whether the change left the gate.

        If it did, anything may have happened meanwhile, even a commit, and the work must be planned again.
        """
        return self._heavy_work

    async def close(self) -> None:
        """Hold back new changes and return when none is in progress; a second `close` waits for the first to `open`."""
        while self._heavy_allowed is not None:
            await self._heavy_allowed.wait()
        self._heavy_allowed = trio.Event()
        try:
            await self._wait_for_heavy()
            self._opened = trio.Event()
            self.closed = True
            await self._wait_for_changes()
        except BaseException:
            self.open()
            raise

    def open(self) -> None:
        """Let the waiting changes continue."""
        if self._opened is not None:
            self._opened.set()
            self._opened = None
            self.closed = False
        if self._heavy_allowed is not None:
            self._heavy_allowed.set()
            self._heavy_allowed = None

    async def _wait_for_heavy(self) -> None:
        if not self._heavy:
            return
        self._heavy_done = trio.Event()
        try:
            await self._heavy_done.wait()
        finally:
            self._heavy_done = None

    async def _wait_for_changes(self) -> None:
        if not self._changes:
            return
        self._changes_done = trio.Event()
        try:
            await self._changes_done.wait()
        finally:
            self._changes_done = None

    async def _enter(self) -> None:
        while self._opened is not None:
            await self._opened.wait()
        self._changes += 1

    def _leave(self) -> None:
        self._changes -= 1
        if not self._changes and self._changes_done is not None:
            self._changes_done.set()

    async def _begin_heavy(self) -> bool:
        stepped_out = False
        while self._heavy_allowed is not None:
            stepped_out = True
            await self._wait_outside(self._heavy_allowed)
        self._heavy += 1
        return stepped_out

    async def _wait_outside(self, until: trio.Event) -> None:
        """Leave the gate until `until` is set; the change is inside again afterwards, even if this raises."""
        self._leave()
        try:
            await until.wait()
            while self._opened is not None:
                await self._opened.wait()
        finally:
            self._changes += 1

    def _end_heavy(self) -> None:
        self._heavy -= 1
        if not self._heavy and self._heavy_done is not None:
            self._heavy_done.set()


class _Change:
    """The context of a change. It has no state of its own, so all changes share one object."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def __aenter__(self) -> None:
        await self._gate._enter()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gate._leave()


class _Heavy:
    """The context of heavy work within a change; shared in the same way."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def __aenter__(self) -> bool:
        return await self._gate._begin_heavy()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gate._end_heavy()
