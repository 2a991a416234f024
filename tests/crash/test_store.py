"""A store stopped at any changing call is, when it is opened again, as before or as after: never a third state."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from overlayfs.errors import UserError
from overlayfs.store.store import LayerStore
from tests.crash.harness import Fuse, Stopped, closed_again, torn
from tests.crash.stores import OPERATIONS, check, prepare, state
from tests.support.campaign import Campaign
from tests.support.points import Points, chosen
from tests.support.requirements import need_root

STOPPED, FAILED = 9, 1
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE, errno.ENOMEM)

every_operation = pytest.mark.parametrize("name", OPERATIONS)


class Bench:
    """Copies of one prepared store, and the result of an operation on it without a fault."""

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

    @contextmanager
    def tried(self) -> Iterator[Path]:
        """Yield a fresh copy of the prepared store, which is removed afterwards."""
        base = self.copy()
        try:
            yield base
        finally:
            shutil.rmtree(base)

    def copy(self) -> Path:
        """Return a fresh copy of the prepared store."""
        self._count += 1
        made = self._place / f"store{self._count}"
        shutil.copytree(self._place / "template", made)
        return made


def _die_at(base: Path, operation: Callable[[LayerStore], None], fuse: Fuse) -> None:
    """Run an operation in a process that ends at a changing call, so that only the kernel cleans up."""
    child = os.fork()
    if child == 0:
        try:
            with LayerStore(os.fsencode(base)) as store, fuse:
                operation(store)
        except Stopped:
            os._exit(STOPPED)
        finally:
            os._exit(FAILED)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == STOPPED


def _stop_at(bench: Bench, fuses: Iterable[Fuse]) -> Points:
    points = Points()
    for fuse in fuses:
        where = f"at {bench.calls[fuse.at - 1]}, call {fuse.at} of {len(bench.calls)}"
        with points.at(where), bench.tried() as base:
            _die_at(base, bench.operation, fuse)
            check(bench, base, where)
    return points


@pytest.mark.campaign("T1")
@every_operation
def test_stopped_at_every_call(campaign: Campaign, place: Path, name: str) -> None:
    bench = Bench(place, name)
    assert (bench.before == bench.after) == (name in ("hash_late", "collect"))
    points = _stop_at(bench, (Fuse(at) for at in chosen(campaign, len(bench.calls), 8)))
    campaign.held("changes of a store stopped at every changing call", points.tried, points.violations)


@pytest.mark.campaign("T1")
@pytest.mark.parametrize("name", ["publish", "tag", "commit", "hash_late", "make_workspace"])
def test_stopped_in_the_middle_of_every_write(campaign: Campaign, place: Path, name: str) -> None:
    bench = Bench(place, name)
    points = _stop_at(bench, torn(campaign, bench.calls, 2))
    campaign.held("changes of a store stopped in the middle of every write", points.tried, points.violations)


def test_opening_with_a_full_disk(place: Path) -> None:
    """Recovery may have to wait for space; the store is usable before, and gc frees some."""
    bench = Bench(place, "commit")
    at = bench.calls.index("rename_at", bench.calls.index("syncfs")) + 1
    left = bench.copy()
    for later in range(at, len(bench.calls) + 1):
        shutil.rmtree(left)
        left = bench.copy()
        _die_at(left, bench.operation, Fuse(later))
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


def _fail_at(campaign: Campaign, place: Path, name: str, lasting: bool, quick: int) -> Points:
    """A disk that fails, once or until it is repaired: as before or as after, and the process continues."""
    bench = Bench(place, name)
    points = Points()
    for error in ERRORS if campaign.full else ERRORS[:1]:
        for at in chosen(campaign, len(bench.calls), quick):
            where = f"{errno.errorcode[error]} at {bench.calls[at - 1]}, call {at} of {len(bench.calls)}"
            with points.at(f"{name}: {where}"), bench.tried() as base, closed_again():
                _fail(base, bench.operation, Fuse(at, error, lasting))
                check(bench, base, where)
    return points


def _fail(base: Path, operation: Callable[[LayerStore], None], fuse: Fuse) -> None:
    with ExitStack() as stack:
        store = stack.enter_context(LayerStore(os.fsencode(base)))
        stack.enter_context(fuse)
        stack.enter_context(suppress(OSError, UserError))
        operation(store)


@pytest.mark.campaign("T3")
@every_operation
def test_failing_at_every_call(campaign: Campaign, place: Path, name: str) -> None:
    points = _fail_at(campaign, place, name, lasting=False, quick=6)
    campaign.held("changes of a store failing at every changing call", points.tried, points.violations)


@pytest.mark.campaign("T3")
@every_operation
def test_failing_from_every_call_on(campaign: Campaign, place: Path, name: str) -> None:
    points = _fail_at(campaign, place, name, lasting=True, quick=3)
    campaign.held("changes of a store failing from every changing call on", points.tried, points.violations)
