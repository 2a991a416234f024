"""Decoding inverts encoding, escaping is reversible, and any value on disk is decoded or refused."""

import errno
import os
import stat
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayfs.format import metacopy, nlink, opaque, origin, override, redirect, whiteout, xattrs
from overlayfs.format.xattrs import Mode
from tests.unit.samples import attempt, attribute_names, component, overrides

# --- names of attributes


@given(attribute_names)
def test_a_users_attribute_is_read_back_under_its_own_name(name: bytes) -> None:
    stored = attempt(xattrs.stored_name, name)
    if isinstance(stored, int):
        assert stored in (errno.EPERM, errno.EOPNOTSUPP)
    else:
        assert xattrs.shown_name(stored) == name
        assert not xattrs.is_private(stored)


@given(attribute_names)
def test_no_user_can_reach_a_mark(name: bytes) -> None:
    shown = xattrs.shown_name(name)
    assert xattrs.is_private(name) == (shown is None)
    if shown is not None:
        assert xattrs.stored_name(shown) == name


@given(attribute_names, st.booleans())
def test_private_names_cannot_be_stored(name: bytes, active: bool) -> None:
    stored = attempt(xattrs.stored_name, name, active)
    if isinstance(stored, int):
        assert stored in (errno.EPERM, errno.EOPNOTSUPP)
    else:
        assert not xattrs.is_private(stored, active)


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        (b"user.note", b"user.note"),
        (b"trusted.overlay.opaque", None),
        (b"user.overlay.anything", None),
        (b"trusted.overlay.overlay.opaque", b"trusted.overlay.opaque"),
        (b"user.overlay.overlay.overlay.opaque", b"user.overlay.overlay.opaque"),
        (b"trusted.overlay.overlay", None),
        (b"trusted.overlayfsrz", b"trusted.overlayfsrz"),
        (b"trusted.overlay", b"trusted.overlay"),
        (b"user.fuseoverlayfs.opaque", None),
        (b"user.fuseoverlayfs", b"user.fuseoverlayfs"),
        (b"user.containers.override_stat", b"user.containers.override_stat"),
        (b"security.fuseoverlayfs.override_stat", b"security.fuseoverlayfs.override_stat"),
        (b"trusted.overlaypy.lazy", None),
        (b"user.overlaypy.lazy", None),
    ],
)
def test_shown_names(stored: bytes, shown: bytes | None) -> None:
    assert xattrs.shown_name(stored) == shown


@pytest.mark.parametrize("name", [b"user.containers.override_stat", b"security.fuseoverlayfs.override_stat"])
def test_override_is_private_only_where_it_is_active(name: bytes) -> None:
    assert xattrs.stored_name(name) == name
    assert xattrs.shown_name(name, override_active=True) is None
    with pytest.raises(PermissionError):
        xattrs.stored_name(name, override_active=True)


def test_an_escaped_name_must_fit() -> None:
    fits = b"trusted.overlay.".ljust(247, b"x")
    assert len(xattrs.stored_name(fits)) == 255
    with pytest.raises(OSError) as caught:
        xattrs.stored_name(fits + b"x")
    assert caught.value.errno == errno.EOPNOTSUPP
    assert xattrs.stored_name(b"user.".ljust(255, b"x"))


def test_prefixes() -> None:
    assert [xattrs.prefix(mode) for mode in (Mode.TRUSTED, Mode.USER)] == [b"trusted.overlay.", b"user.overlay."]


# --- whiteouts


@given(component.filter(lambda name: len(name) <= 251))
def test_a_whiteout_file_names_what_it_deletes(name: bytes) -> None:
    if not name.startswith(b".wh."):
        assert whiteout.target(whiteout.name_for(name)) == name
    assert whiteout.is_reserved(whiteout.name_for(name))


@pytest.mark.parametrize(
    "name", [b".wh.", b".wh..", b".wh...", b".wh..wh.", b".wh..wh..opq", b".wh..wh.plnk", b"wh.x", b".w", b"x.wh.y"]
)
def test_names_that_delete_nothing(name: bytes) -> None:
    assert whiteout.target(name) is None


def test_odd_whiteout_names() -> None:
    assert whiteout.target(b".wh..hidden") == b".hidden"
    assert whiteout.target(b".wh....") == b"..."
    assert whiteout.is_reserved(whiteout.OPAQUE_MARK)
    assert not whiteout.is_reserved(b".whx")


@given(st.integers(0, 0o177777), st.integers(0, 2**32))
def test_device_whiteouts(mode: int, rdev: int) -> None:
    assert whiteout.is_device_whiteout(mode, rdev) == (stat.S_IFMT(mode) == stat.S_IFCHR and rdev == 0)


# --- opaque


@given(st.none() | st.binary(max_size=4))
def test_opaque_is_exactly_one_byte(value: bytes | None) -> None:
    assert opaque.is_opaque(value) == (value == b"y")
    assert opaque.is_opaque_fuseoverlayfs(value) == ((value or b"")[:1] == b"y")


def test_opaque_samples() -> None:
    assert opaque.is_opaque(opaque.OPAQUE_VALUE)
    assert not opaque.is_opaque(b"yes")
    assert not opaque.is_opaque(b"x")
    assert opaque.is_opaque_fuseoverlayfs(b"yes")


# --- redirect


@given(st.lists(component, min_size=1, max_size=3), st.booleans())
def test_a_redirect_that_can_be_written_is_followed(parts: list[bytes], absolute: bool) -> None:
    path = b"/" + b"/".join(parts) if absolute else parts[0]
    if len(path) > redirect.MAX:
        with pytest.raises(OSError) as caught:
            redirect.encode(path)
        assert caught.value.errno == errno.EXDEV
    else:
        assert redirect.parse(redirect.encode(path)) == path


@given(st.binary(max_size=40) | st.text(alphabet="/.ab\0", max_size=10).map(str.encode))
def test_a_followed_redirect_has_only_plain_components(value: bytes) -> None:
    path = redirect.parse(value)
    if path is None:
        with pytest.raises(OSError):
            redirect.encode(value)
        return
    parts = path[1:].split(b"/") if path.startswith(b"/") else [path]
    assert all(part and part not in (b".", b"..") and b"/" not in part and b"\0" not in part for part in parts)


@pytest.mark.parametrize(
    "value",
    [b"", b"/", b"//a", b"/a/", b"/a//b", b"a/b", b"..", b".", b"/a/../b", b"/./a", b"a\0", b"x" * 256, b"/a" * 2048],
)
def test_malformed_redirects_have_no_effect(value: bytes) -> None:
    assert redirect.parse(value) is None


# --- metacopy


@given(st.integers(0, 255), st.binary(max_size=64), st.integers(0, 255))
def test_metacopy_with_a_digest_is_accepted(algorithm: int, digest: bytes, flags: int) -> None:
    metacopy.check(bytes((0, 4 + len(digest), flags, algorithm)) + digest)


@given(st.binary(min_size=1, max_size=80))
def test_metacopy_is_accepted_or_refused(value: bytes) -> None:
    well_formed = len(value) >= 4 and value[0] == 0 and value[1] == len(value) <= 68
    if well_formed:
        metacopy.check(value)
        return
    with pytest.raises(OSError) as caught:
        metacopy.check(value)
    assert caught.value.errno == errno.EIO


def test_metacopy_without_digest_is_empty() -> None:
    assert metacopy.VALUE == b""
    metacopy.check(metacopy.VALUE)


# --- origin

origins = st.builds(
    origin.Origin, st.binary(min_size=16, max_size=16), st.integers(0, 255), st.binary(max_size=128), st.booleans()
)


@given(origins)
def test_an_origin_survives_a_round_trip(value: origin.Origin) -> None:
    assert origin.decode(origin.encode(value)) == value
    assert origin.decode(bytes.fromhex(origin.index_name(value).decode())) == value


@given(st.binary(max_size=160) | st.binary(max_size=40).map(lambda tail: b"\0\xfb\x20" + tail))
def test_an_unknown_origin_is_none(value: bytes) -> None:
    decoded = origin.decode(value)
    if decoded is not None:
        assert value[:2] == b"\0\xfb"
        assert len(decoded.fid) + 21 == value[2] <= len(value)


SAMPLE = bytes.fromhex("00fb1d0001") + bytes(range(16)) + bytes.fromhex("0c00000007000000")


@pytest.mark.parametrize(
    "value",
    [b"", SAMPLE[:-1], b"\1" + SAMPLE[1:], b"\0\xfa" + SAMPLE[2:], SAMPLE[:3] + b"\x08" + SAMPLE[4:], b"\0\xfb\x14"],
)
def test_origins_that_are_unknown(value: bytes) -> None:
    assert origin.decode(SAMPLE) is not None
    assert origin.decode(value) is None


def test_a_handle_of_the_other_byte_order_is_unknown() -> None:
    host = SAMPLE[3] & 1
    assert origin.decode(SAMPLE[:3] + bytes([1 - host]) + SAMPLE[4:]) is None
    assert origin.decode(SAMPLE[:3] + b"\2" + SAMPLE[4:]) is not None


@given(origins)
def test_inode_numbers_are_read_from_known_handles_only(value: origin.Origin) -> None:
    found = origin.inode(value)
    if found is not None:
        assert value.fid_type in (0x01, 0x02, 0x81, 0x82, 0x4D, 0x4E, 0x4F)
        assert 0 <= found[0] < 2**64


def test_a_fuse_handle_is_not_taken_for_one_of_xfs() -> None:
    fid = bytes(range(12))
    assert origin.inode(origin.Origin(bytes(16), 0x81, fid)) is None
    assert origin.inode(origin.Origin(b"u" * 16, 0x81, fid)) is not None


# --- nlink


@given(st.sampled_from(["U", "L"]), st.integers(-(2**31), 2**31))
def test_link_counts_survive_a_round_trip(base: Literal["U", "L"], delta: int) -> None:
    assert nlink.decode(nlink.encode(base, delta)) == (base, delta)


def test_link_counts() -> None:
    assert nlink.encode("U", 0) == b"U+0"
    assert nlink.decode(b"L-2") == ("L", -2)
    for value in (b"", b"U", b"U1", b"X+1", b"U+", b"U+1 ", b"U+1x", b"U+99999999999"):
        assert nlink.decode(value) is None


# --- override_stat


@given(overrides)
def test_an_override_survives_a_round_trip(value: override.Override) -> None:
    assert override.parse(override.encode(value)) == value


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (b"0:0:0755", override.Override(0, 0, 0o755)),
        (b"1:2:4755:file", override.Override(1, 2, 0o4755, stat.S_IFREG)),
        (b"1:2:755:dir:more:and more", override.Override(1, 2, 0o755, stat.S_IFDIR)),
        (b"0:0:666:char-1-3", override.Override(0, 0, 0o666, stat.S_IFCHR, os.makedev(1, 3))),
        (b"0:0:666:block--8--1", override.Override(0, 0, 0o666, stat.S_IFBLK, os.makedev(8, 1))),
        (b"0:0:100644:pipe", override.Override(0, 0, 0o644, stat.S_IFIFO)),
    ],
)
def test_override_samples(value: bytes, meaning: override.Override) -> None:
    assert override.parse(value) == meaning


@pytest.mark.parametrize(
    "value",
    [b"", b"0", b"0:0", b"0:0:", b"0:0:8", b"-1:0:755", b"x:0:755", b"0:0:755:", b"0:0:755:door", b"0:0:755:char-1",
     b"0:0:755:char-1-x", b"0:0:755:char:1:3", b"0:0:755:char-99999-1", b"4294967295:0:755", b"0:0:755\n"],
)  # fmt: skip
def test_garbage_in_an_override_is_einval(value: bytes) -> None:
    with pytest.raises(OSError) as caught:
        override.parse(value)
    assert caught.value.errno == errno.EINVAL


@given(st.binary(max_size=40) | st.text(alphabet="0123456789:-filecharblock", max_size=40).map(str.encode))
def test_an_override_is_read_or_refused(value: bytes) -> None:
    found = attempt(override.parse, value)
    if isinstance(found, int):
        assert found == errno.EINVAL
    else:
        assert override.parse(override.encode(found)) == found


@given(component)
def test_covered_names_survive_a_round_trip(name: bytes) -> None:
    if len(name) + 25 > 255:
        with pytest.raises(OSError):
            override.covered_name(name)
    elif name != b"stat":
        assert override.uncovered_name(override.covered_name(name)) == name


def test_the_override_itself_covers_nothing() -> None:
    for name in (b"user.containers.override_stat", b"user.containers.override_", b"security.capability"):
        assert override.uncovered_name(name) is None
