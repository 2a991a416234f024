"""Files that are read and written in passthrough and through the page cache, in any order."""

import os
from pathlib import Path

import pytest

from overlayfs.mount import control_client
from tests.mounted.conftest import Mount
from tests.mounted.passthrough_checks import AUTO, PASSTHROUGH, prepare
from tests.support import syscalls

pytestmark = pytest.mark.engine("kernel")


def _run(mount: Mount, check: str, io: str) -> None:
    prepare(mount, check)
    lower = _prints(mount)
    mount.start(options=f"suid,volatile,io={io}")  # a copy-up need not wait for the disk
    (PASSTHROUGH if io == "passthrough" else AUTO)[check](mount)
    mount.unmount()
    assert _prints(mount) == lower, "a layer was changed"
    assert os.listdir(mount.stack.work / "work") == []


def _prints(mount: Mount) -> dict[Path, tuple[int, int, int]]:
    found = ((path, path.lstat()) for path in (mount.stack.base / "low").rglob("*"))
    return {path: (each.st_mtime_ns, each.st_ctime_ns, each.st_size) for path, each in found}


@pytest.mark.parametrize("check", AUTO)
def test_by_default(mount: Mount, check: str) -> None:
    _run(mount, check, "auto")


@pytest.mark.parametrize("check", AUTO)
def test_through_the_page_cache(mount: Mount, check: str) -> None:
    _run(mount, check, "cached")


@pytest.mark.parametrize("check", PASSTHROUGH)
def test_in_passthrough_where_possible(mount: Mount, check: str) -> None:
    _run(mount, check, "passthrough")


def test_each_io_option_does_what_it_says(mount: Mount) -> None:
    """Otherwise the tests above would prove nothing: writes in passthrough send no requests, others do."""
    prepare(mount, "")
    writes = {}
    for io in ("auto", "passthrough", "cached"):
        mount.start(options=f"io={io}")
        with open(mount.point / "large0", "rb", buffering=0) as reader:
            for at in range(10):
                os.pread(reader.fileno(), 10, at * 30_000)
        with open(mount.point / io, "wb", buffering=0) as file:
            file.writelines(b"x" * 10 for _ in range(10))
        found = control_client.Client.at(os.fsencode(mount.point)).stats().requests
        writes[io] = found.get("WRITE", 0), bool(found.get("READ"))
        mount.unmount()
    assert writes == {"auto": (0, True), "passthrough": (0, False), "cached": (10, True)}


def test_a_mount_is_a_layer_of_the_kernels_overlay(mount: Mount) -> None:
    """Passthrough counts as one level of stacking: it must leave room for one more."""
    mount.start()
    (mount.point / "new").write_bytes(b"x")
    nested = mount.stack.base / "nested"
    nested.mkdir()
    option = f"lowerdir={mount.point}:{mount.stack.base}/low".encode()
    syscalls.mount(b"overlay", os.fsencode(nested), b"overlay", 0, option)
    try:
        assert (nested / "new").read_bytes() == b"x"
        assert (nested / "d" / "f").read_bytes() == b"low" * 1000
    finally:
        syscalls.umount(os.fsencode(nested))
    mount.unmount()
