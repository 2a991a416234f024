"""A CREATE of a name that exists by now: the file is copied up in a thread, and a second CREATE waits for that."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import trio

from overlayfs import Overlay, StackConfig
from overlayfs.fuse.caching_policy import caching
from overlayfs.fuse.engine import Engine, MountSettings
from overlayfs.fuse.pyfuse3.engine import Pyfuse3Engine
from overlayfs.fuse.pyfuse3.handlers import Handlers
from overlayfs.tree import staging

pytestmark = pytest.mark.root

CONTENT = b"lower" * 1000


def _overlay(place: Path) -> Overlay:
    for name in ("lower", "upper", "work"):
        (place / name).mkdir()
    (place / "lower" / "file").write_bytes(CONTENT)
    lower, upper, work = (os.fsencode(place / name) for name in ("lower", "upper", "work"))
    return Overlay(StackConfig(lower=(lower,), upper=upper, work=work))


async def _create_twice(engine: Engine) -> list[str]:
    """Two requests at once, as sent for two clients whose look-ups both returned ENOENT."""
    handlers = Handlers(engine, MountSettings())
    caller: Any = SimpleNamespace(uid=0, gid=0, umask=0, pid=os.getpid())
    build, threads = staging.build, []

    def built(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return build(*args)

    async def create() -> None:
        info, entry = await handlers.create(1, b"file", 0o644, os.O_RDWR, caller)
        assert await handlers.read(info.fh, 0, 1 << 16) == CONTENT and entry.st_size == len(CONTENT)
        await handlers.release(info.fh)

    with mock.patch.object(staging, "build", built), trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(create)
            nursery.start_soon(create)
    return threads


def test_a_name_that_exists_by_now_is_copied_up_beside_the_loop(tmp_path: Path) -> None:
    overlay = _overlay(tmp_path)
    try:
        threads = trio.run(_create_twice, Pyfuse3Engine(overlay, caching()))
        assert len(threads) == 1, "one copy for both"
        assert threads != [threading.main_thread().name], "which did not stop the loop"
    finally:
        overlay.close()
    assert (tmp_path / "upper" / "file").read_bytes() == CONTENT
