"""A store stopped at any changing call is, when it is opened again, as before or as after: never a third state."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from overlayfs.errors import UserError
from overlayfs.store.store import LayerStore
from tests.crash.harness import Fuse, Stopped
from tests.crash.stores import OPERATIONS, check, prepare, state
from tests.support.requirements import need_root

STOPPED, FAILED = 9, 1

every_operation = pytest.mark.parametrize("name", OPERATIONS)


class Bench:
    """Copies of one prepared store, and what an operation makes of it when nothing goes wrong."""

    def __init__(self, place: Path, name: str) -> None:
        need_root()
        self._place = place
        self._count = 0
        self.operation = OPERATIONS[name]
        prepare(place / "template")
        with LayerStore(os.fsencode(place / "template")) as store:
            self.before = state(store)
        whole = self.copy()
        with LayerStore(os.fsencode(whole)) as store, Fuse() as fuse:
            self.operation(store)
        self.calls = fuse.calls
        with LayerStore(os.fsencode(whole)) as store:
            self.after = state(store)

    def copy(self) -> Path:
        """Return a fresh copy of the prepared store."""
        self._count += 1
        made = self._place / f"store{self._count}"
        shutil.copytree(self._place / "template", made)
        return made


def _die_at(base: Path, operation: Callable[[LayerStore], None], at: int) -> None:
    """Run an operation in a process that ends at a changing call, so that the kernel alone cleans up."""
    child = os.fork()
    if child == 0:
        try:
            with LayerStore(os.fsencode(base)) as store, Fuse(at):
                operation(store)
        except Stopped:
            os._exit(STOPPED)
        finally:
            os._exit(FAILED)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == STOPPED


@every_operation
def test_stopped_at_every_call(place: Path, name: str) -> None:
    bench = Bench(place, name)
    assert (bench.before == bench.after) == (name in ("hash_late", "collect"))
    for at in range(1, len(bench.calls) + 1):
        base = bench.copy()
        _die_at(base, bench.operation, at)
        check(bench, base, f"at {bench.calls[at - 1]}, call {at} of {len(bench.calls)}")
        shutil.rmtree(base)


def test_opening_with_a_full_disk(place: Path) -> None:
    """What a killed process left may have to wait for room; the store can be used before, and gc makes some."""
    bench = Bench(place, "commit")
    at = bench.calls.index("rename_at", bench.calls.index("syncfs")) + 1
    left = bench.copy()
    for later in range(at, len(bench.calls) + 1):
        shutil.rmtree(left)
        left = bench.copy()
        _die_at(left, bench.operation, later)
        if any((left / "intents").iterdir()) and not (left / "workspaces/mine/upper").exists():
            break
    for failing in range(1, 30):
        base = place / "full"
        shutil.copytree(left, base)
        with Fuse(failing, errno.ENOSPC) as fuse, LayerStore(os.fsencode(base)) as store:
            assert [image.name for image in store.images()][:2] == ["late:latest", "other:latest"]
            with suppress(OSError):
                store.gc()
        with LayerStore(os.fsencode(base)) as store:
            assert state(store) == bench.after, f"at {fuse.calls[failing - 1]}"
        shutil.rmtree(base)


@every_operation
def test_failing_at_every_call(place: Path, name: str) -> None:
    """A full disk at any call: the same, and the process goes on."""
    bench = Bench(place, name)
    for at in range(1, len(bench.calls) + 1):
        base = bench.copy()
        with LayerStore(os.fsencode(base)) as store, Fuse(at, errno.ENOSPC), suppress(OSError, UserError):
            bench.operation(store)
        check(bench, base, f"at {bench.calls[at - 1]}, call {at} of {len(bench.calls)}")
        shutil.rmtree(base)
