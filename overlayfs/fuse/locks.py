"""Locks by key, which exist only while they are held: one for each node that is being copied up or changed.

Taking a free lock is no scheduling point, so a handler that waits for nothing else stays atomic. Several keys are taken
in ascending order, whatever order they are passed in, so two holders cannot wait for each other.
"""

from types import TracebackType

import trio


class KeyedLocks:
    """A set of locks named by integers."""

    def __init__(self) -> None:
        self._waiting: dict[int, trio.lowlevel.ParkingLot] = {}  # a key is present while it is held

    def hold(self, *keys: int) -> "_Hold":
        """Return a context that holds the locks of all `keys`; a task must not nest holds of one key."""
        return _Hold(self, keys)

    async def _acquire(self, key: int) -> None:
        waiting = self._waiting.get(key)
        if waiting is None:
            self._waiting[key] = trio.lowlevel.ParkingLot()
        else:
            await waiting.park()  # the task that releases the lock hands it over

    def _release(self, key: int) -> None:
        waiting = self._waiting[key]
        if waiting:
            waiting.unpark()
        else:
            del self._waiting[key]


class _Hold:
    def __init__(self, locks: KeyedLocks, keys: tuple[int, ...]) -> None:
        self._locks = locks
        self._keys = keys if len(keys) == 1 else tuple(sorted(set(keys)))
        self._held = 0

    async def __aenter__(self) -> None:
        try:
            for key in self._keys:
                await self._locks._acquire(key)
                self._held += 1
        except BaseException:
            self._release()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        while self._held:
            self._held -= 1
            self._locks._release(self._keys[self._held])
