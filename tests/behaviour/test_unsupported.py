"""What the portable engine does not support: refused with the errors that programs expect."""

import ctypes
import fcntl
import os
from errno import ENOTTY, EOPNOTSUPP

import pytest

from tests.support.drivers.posix import PosixHandle
from tests.support.outcome import errno_of
from tests.support.spec import File
from tests.support.stacks import StackMaker

pytestmark = pytest.mark.on("pyfuse3")

FICLONE, FS_IOC_GETFLAGS, PUNCH_HOLE_KEEP_SIZE = 0x40049409, 0x80086601, 3


def descriptor(handle: object) -> int:
    assert isinstance(handle, PosixHandle)
    return handle.fd


def test_unnamed_temporary_files(stack: StackMaker) -> None:
    tree = stack({"d": {}})
    assert errno_of(os.open, tree.stack.mountpoint / "d", os.O_TMPFILE | os.O_RDWR) == EOPNOTSUPP


def test_ioctls_and_clones(stack: StackMaker) -> None:
    tree = stack({"f": "data", "g": ""})
    source, target = descriptor(tree.open("f")), descriptor(tree.open("g", os.O_RDWR))
    assert errno_of(fcntl.ioctl, target, FICLONE, source) in (EOPNOTSUPP, ENOTTY)
    assert errno_of(fcntl.ioctl, source, FS_IOC_GETFLAGS, bytearray(8)) == ENOTTY


def test_punching_holes(stack: StackMaker) -> None:
    tree = stack({"f": File(b"x" * 8192)})
    fd = descriptor(tree.open("f", os.O_RDWR))
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.fallocate(fd, PUNCH_HOLE_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(4096))
    assert (result, ctypes.get_errno()) == (-1, EOPNOTSUPP)
    assert tree.read("f") == b"x" * 8192


def test_a_sparse_file_looks_like_data_all_over(stack: StackMaker) -> None:
    tree = stack({"f": File(pieces=((1 << 20, b"x"),), size=2 << 20)})
    fd = descriptor(tree.open("f"))
    assert os.lseek(fd, 0, os.SEEK_DATA) == 0
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 2 << 20
