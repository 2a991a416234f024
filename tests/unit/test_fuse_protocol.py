"""The structures of the FUSE protocol: sizes as in linux/fuse.h, every field survives a round trip."""

import errno
import os
import struct
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlayfs.fuse.kernel.protocol import (
    IN_HEADER,
    LAYOUTS,
    Init,
    Layout,
    Op,
    decode_device,
    encode_device,
    padded,
    split_flags,
)
from overlayfs.fuse.kernel.request import Request

# sizeof() of the structures in linux/fuse.h on a 64-bit machine; a structure composed of several of them has their sum.
SIZES = {
    "in_header": 40, "out_header": 16, "attr": 88, "entry_out": 128, "attr_out": 104, "open_out": 16,
    "create_out": 128 + 16, "init_out": 64, "forget_in": 8, "batch_forget_in": 8, "forget_one": 16, "getattr_in": 16,
    "setattr_in": 88, "mknod_in": 16, "mkdir_in": 8, "rename_in": 8, "rename2_in": 16, "link_in": 8, "open_in": 8,
    "create_in": 16, "release_in": 24, "read_in": 40, "write_in": 40, "write_out": 8, "statfs_out": 80, "fsync_in": 16,
    "setxattr_in": 16, "getxattr_in": 8, "getxattr_out": 8, "interrupt_in": 8, "ioctl_in": 32, "ioctl_out": 16,
    "fallocate_in": 32, "lseek_in": 24, "lseek_out": 8, "copy_file_range_in": 56, "copy_file_range_out": 8,
    "dirent": 24, "direntplus": 152, "statx_in": 24, "statx_out": 288, "inval_inode": 24, "inval_entry": 16,
    "store": 24, "backing_map": 16, "entry_reply": 16 + 128, "attr_reply": 16 + 104, "open_reply": 16 + 16,
    "create_reply": 16 + 128 + 16, "write_reply": 16 + 8,
    "init_in": 20,  # the fields that are known, of 64 bytes: kernels before 5.17 send 16
}  # fmt: skip
_RANGES = {
    "I": (0, 2**32 - 1), "i": (-(2**31), 2**31 - 1), "Q": (0, 2**64 - 1), "q": (-(2**63), 2**63 - 1),
    "H": (0, 2**16 - 1),
}  # fmt: skip


def values(layout: Layout) -> st.SearchStrategy[dict[str, int]]:
    """Values for every named field of a structure."""
    codes = dict(zip(layout.fields, layout.format.removeprefix("<"), strict=True))
    return st.fixed_dictionaries({name: st.integers(*_RANGES[code]) for name, code in codes.items() if name != "_"})


def test_the_table_is_complete() -> None:
    assert {name: layout.size for name, layout in LAYOUTS.items()} == SIZES


@pytest.mark.parametrize("name", LAYOUTS)
def test_fields_are_where_the_compiler_puts_them(name: str) -> None:
    """Natural alignment with no gap: packed as C packs it, it has the same size."""
    codes = LAYOUTS[name].format.removeprefix("<")
    if name != "init_in":  # its 20 bytes are the beginning of a structure
        assert struct.calcsize("@" + codes) == LAYOUTS[name].size
    offset = 0
    for code in codes:
        assert offset % struct.calcsize(code) == 0
        offset += struct.calcsize(code)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=20)
@given(data=st.data(), before=st.binary(max_size=9))
def test_a_round_trip(name: str, data: st.DataObject, before: bytes) -> None:
    layout = LAYOUTS[name]
    given_values: Mapping[str, int] = data.draw(values(layout))
    packed = layout.encode(**given_values)
    assert len(packed) == SIZES[name]
    assert layout.decode(before + packed, len(before)) == given_values
    assert layout.decode(memoryview(bytearray(packed))) == given_values


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_truncated_structure_is_an_error(name: str) -> None:
    with pytest.raises(struct.error):
        LAYOUTS[name].decode(bytes(LAYOUTS[name].size - 1))


def test_an_unknown_field_is_an_error() -> None:
    with pytest.raises(TypeError, match="nodes"):
        LAYOUTS["entry_out"].encode(nodes=1)


@pytest.mark.parametrize(
    ("name", "field", "offset"),
    [
        ("in_header", "unique", 8), ("in_header", "pid", 32), ("entry_out", "attr_valid", 24), ("attr", "mode", 60),
        ("setattr_in", "mode", 68), ("setattr_in", "uid", 76), ("write_in", "lock_owner", 24),
        ("init_out", "max_write", 20), ("init_out", "flags2", 32), ("init_out", "max_stack_depth", 36),
        ("statx_out", "mask", 32), ("statx_out", "mode", 60),
        ("statx_out", "btime_sec", 112), ("statx_out", "rdev_major", 160), ("direntplus", "namelen", 144),
    ],
)  # fmt: skip
def test_fields_are_where_the_header_says(name: str, field: str, offset: int) -> None:
    packed = LAYOUTS[name].encode(**{field: 1})
    assert packed.index(1) == offset


def test_numbers_of_the_header() -> None:
    """A sample from each enumeration, read off linux/fuse.h."""
    assert (Op.LOOKUP, Op.SETATTR, Op.SYMLINK, Op.RELEASE, Op.SETXATTR, Op.INIT) == (1, 4, 6, 18, 21, 26)
    assert (Op.CREATE, Op.BATCH_FORGET, Op.RENAME2, Op.SYNCFS, Op.TMPFILE, Op.STATX) == (35, 42, 45, 50, 51, 52)
    assert Init.PASSTHROUGH == 1 << 37 and Init.INIT_EXT == 1 << 30 and Init.HANDLE_KILLPRIV_V2 == 1 << 28


@given(st.integers(0, 2**64 - 1))
def test_features_travel_in_two_halves(flags: int) -> None:
    low, high = split_flags(flags)
    assert 0 <= low < 2**32 and low | high << 32 == flags


@given(st.binary(max_size=300))
def test_names_of_listings_fill_words(name: bytes) -> None:
    found = padded(name)
    assert len(found) % 8 == 0 and len(found) - len(name) < 8
    assert found.rstrip(b"\0") == name.rstrip(b"\0")


@given(st.integers(0, 2**12 - 1), st.integers(0, 2**20 - 1))
def test_device_numbers(major: int, minor: int) -> None:
    """As linux/kdev_t.h writes them, which is the only form that fits into 32 bits."""
    device = os.makedev(major, minor)
    encoded = encode_device(device)
    assert encoded == minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
    assert encoded < 2**32 and decode_device(encoded) == device


_name = st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name)


def request(body: bytes) -> Request:
    """A request with this body."""
    header = IN_HEADER.pack(IN_HEADER.size + len(body), Op.LOOKUP, 1, 1, 0, 0, 0, 0, 0)
    return Request(memoryview(header + body))


@given(_name, _name, st.binary(max_size=60))
def test_names_of_requests(first: bytes, second: bytes, before: bytes) -> None:
    start = len(before)
    assert request(before + first + b"\0").name(start) == first
    assert request(before + first + b"\0" + second + b"\0").two_names(start) == (first, second)


@given(_name, _name)
def test_requests_without_their_names(first: bytes, second: bytes) -> None:
    for body in (b"", first, first + b"\0" + second, first + b"\0" + second + b"\0"):
        with pytest.raises(OSError) as caught:
            request(body).name()
        assert caught.value.errno == errno.EINVAL
    for body in (b"", first, first + b"\0", first + b"\0" + second):
        with pytest.raises(OSError) as caught:
            request(body).two_names()
        assert caught.value.errno == errno.EINVAL
