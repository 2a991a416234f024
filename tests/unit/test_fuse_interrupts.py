"""INTERRUPT: a request that only waits ends with EINTR; one that is in progress ends as usual."""

import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from overlayfs import Overlay, StackConfig
from overlayfs.fuse.kernel.passthrough import Io
from overlayfs.fuse.kernel.protocol import LAYOUTS, OUT_HEADER, Op
from tests.unit.fuse_fuzz import OFFERED, Recorder

pytestmark = pytest.mark.root

CONTENT = b"content" * 1_000_000  # large enough for a copy in a thread


@pytest.fixture
def engine(place: Path) -> Iterator[Recorder]:
    """An engine over a layer with one file that has data."""
    for name in ("low", "u", "w"):
        (place / name).mkdir()
    (place / "low" / "f").write_bytes(CONTENT)
    low, upper, work = (os.fsencode(place / name) for name in ("low", "u", "w"))
    overlay = Overlay(StackConfig(lower=(low,), upper=upper, work=work))
    made = Recorder(overlay, Io.CACHED, None)
    made.put(Op.INIT, 1, 0, LAYOUTS["init_in"].pack(7, 45, 0, OFFERED & 0xFFFF_FFFF, OFFERED >> 32))
    made.replies.clear()
    yield made
    made.detach()
    overlay.close()


def _run(engine: Recorder, story: Callable[[], Awaitable[None]]) -> None:
    async def live() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                engine._session.nursery = nursery
                await story()

    trio.run(live)


def _answers(engine: Recorder) -> dict[int, int]:
    """The errno by unique number of what was answered."""
    found = (OUT_HEADER.unpack_from(reply) for reply in engine.replies)
    return {unique: -error for _, error, unique in found}


def _mkdir(engine: Recorder, unique: int, name: bytes) -> None:
    engine.put(Op.MKDIR, unique, 1, LAYOUTS["mkdir_in"].pack(0o755, 0) + name + b"\0")


def _interrupt(engine: Recorder, unique: int) -> None:
    engine.put(Op.INTERRUPT, unique | 1, 0, LAYOUTS["interrupt_in"].pack(unique))


def test_a_request_that_waits_at_the_gate_can_be_interrupted(engine: Recorder, place: Path) -> None:
    async def story() -> None:
        await engine.gate.close()
        _mkdir(engine, 2, b"given up")
        _mkdir(engine, 4, b"waited for")
        await trio.testing.wait_all_tasks_blocked()
        assert not engine.replies
        _interrupt(engine, 2)
        await trio.testing.wait_all_tasks_blocked()
        assert _answers(engine) == {2: errno.EINTR}
        engine.gate.open()
        await trio.testing.wait_all_tasks_blocked()

    _run(engine, story)
    assert _answers(engine) == {2: errno.EINTR, 4: 0}
    assert os.listdir(place / "u") == ["waited for"]
    assert not engine._session.waiting


def test_a_copy_up_in_progress_is_finished(engine: Recorder, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request that began it gets its reply; one that waited for it is interrupted."""
    begun, go_on = trio.Event(), trio.Event()
    run = engine.threads.run

    async def slow(call: Callable[[], object]) -> object:
        begun.set()
        with trio.CancelScope(shield=True):
            await go_on.wait()
        return await run(call)

    monkeypatch.setattr(engine.threads, "run", slow)

    async def story() -> None:
        engine.put(Op.LOOKUP, 2, 1, b"f\0")
        nodeid = LAYOUTS["entry_out"].decode(engine.replies[0][OUT_HEADER.size :])["nodeid"]
        for unique in (4, 6):
            engine.put(Op.OPEN, unique, nodeid, LAYOUTS["open_in"].pack(os.O_RDWR, 0))
        await begun.wait()
        await trio.testing.wait_all_tasks_blocked()
        try:
            for unique in (4, 6):
                _interrupt(engine, unique)
            await trio.testing.wait_all_tasks_blocked()
            assert sorted(_answers(engine).values()) == [
                0,
                errno.EINTR,
            ]  # the look-up, the waiting request
        finally:
            go_on.set()

    _run(engine, story)
    assert sorted(_answers(engine)) == [2, 4, 6]
    assert (place / "u" / "f").read_bytes() == CONTENT
    assert os.listdir(place / "w" / "work") == []


def test_an_answered_request_is_not_answered_again(engine: Recorder) -> None:
    async def story() -> None:
        _mkdir(engine, 2, b"made")
        _interrupt(engine, 2)
        _interrupt(engine, 88)
        await trio.testing.wait_all_tasks_blocked()

    _run(engine, story)
    assert _answers(engine) == {2: 0}
