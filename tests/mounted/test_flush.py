"""A thread that waits for our own mount has none of the daemon's descriptors."""

import errno
import mmap
import os
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn
from unittest import mock

import pytest

from overlayfs.errors import oserror
from overlayfs.mount import control_client, flush, syscalls
from overlayfs.mount.control_protocol import CommitImage
from tests.mounted.scene import Scene
from tests.support import engines, processes, serving
from tests.support.drivers.forked import unhashed
from tests.support.fork_server import ForkServer
from tests.support.outcome import errno_of
from tests.support.serving import MountSpec


def test_descriptors_are_absent_and_stay_open(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    assert flush.run_unshared(lambda: errno_of(os.fstat, fd)) == errno.EBADF
    assert os.listdir(fd) == []
    os.close(fd)


def test_the_standard_streams_are_kept() -> None:
    for stream in range(3):
        assert flush.run_unshared(lambda: os.fstat(stream)) == os.fstat(stream)  # noqa: B023 - called at once


def test_an_error_is_raised_in_the_caller(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        flush.run_unshared(lambda: os.stat(tmp_path / "absent"))


def test_where_a_sandbox_refuses_the_flush_still_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse() -> NoReturn:
        raise oserror(errno.EPERM)

    monkeypatch.setattr(syscalls, "unshare_descriptors", refuse)
    fd = os.open(tmp_path, os.O_RDONLY)
    assert flush.run_unshared(lambda: errno_of(os.fstat, fd)) is None
    os.close(fd)


def serve_without_syncfs(spec: MountSpec) -> int:
    """Mount with a daemon that has to flush file by file, since its syncfs does nothing."""
    mock.patch.object(flush, "sysio", SimpleNamespace(syncfs=lambda _: None)).start()
    with unhashed():
        return serving.serve(spec)


@pytest.mark.root
def test_each_commit_waits_for_mapped_pages(fork_server: ForkServer, place: Path) -> None:
    """Also if the previous commit made the file part of a layer, and the old mapping writes to it."""
    scene = Scene(place / "s", fork_server, engines.current())
    cached = "io=cached" if scene.engine == engines.KERNEL else "timeout=1"
    pid = scene.start(scene.spec(cached, **scene.image()), serve_without_syncfs)
    try:
        first, second = _stored_between_commits(scene)
    finally:
        scene.clear()
    assert processes.reap(pid) == 0
    assert first == b"before".ljust(8192, b"\0")
    assert second == b"before".ljust(4096, b"\0") + b"after".ljust(4096, b"\0")


def _stored_between_commits(scene: Scene) -> tuple[bytes, bytes]:
    """Store to one mapping before each of two commits; return what their layers have."""
    path = scene.point / "mapped"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8192) as memory:
        memory[0:6] = b"before"
        first = _committed(scene)
        memory[4096:4101] = b"after"
        return first, _committed(scene)


def _committed(scene: Scene) -> bytes:
    """Commit while mounted; return what the layer has of the file."""
    layer = control_client.Client.at(os.fsencode(scene.point)).commit_image(CommitImage(allow_empty=True)).layer
    return (scene.base / "store" / "layers" / layer / "tree" / "mapped").read_bytes()
