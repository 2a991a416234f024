"""The handshake: which of the offered features are requested."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayfs.fuse.kernel.handshake import MAX_WRITE, PAGES, STACK_DEPTH, TooOldError, Wishes, agree
from overlayfs.fuse.kernel.protocol import LAYOUTS, MINOR, Init, split_flags

EVERYTHING = 0x5FD_73FF_FFFB  # what Linux 6.18 offers
FLAGS2 = ~0xFFFF_FFFF

wishes = st.builds(Wishes, *(st.booleans() for _ in range(5)))


def offer(flags: int = EVERYTHING, minor: int = 45, major: int = 7, max_readahead: int = 131072) -> dict[str, int]:
    """The fields of an INIT request."""
    low, high = split_flags(flags)
    return {"major": major, "minor": minor, "max_readahead": max_readahead, "flags": low, "flags2": high}


@given(st.integers(0, 2**64 - 1), wishes, st.integers(31, 60))
def test_only_offered_features_are_requested(flags: int, wanted: Wishes, minor: int) -> None:
    found = agree(offer(flags, minor), wanted)
    reply = LAYOUTS["init_out"].decode(found.reply)
    asked = reply["flags"] | reply["flags2"] << 32
    assert asked == found.features
    assert not asked & ~flags
    assert not asked & FLAGS2 or flags & Init.INIT_EXT  # the second half counts only with the bit that announces it
    assert (reply["major"], reply["minor"]) == (7, min(minor, MINOR)) and found.minor == reply["minor"]
    assert reply["max_write"] == MAX_WRITE and reply["max_pages"] == PAGES == MAX_WRITE // 4096
    assert reply["max_readahead"] <= 131072


@given(st.integers(0, 2**64 - 1), wishes)
def test_a_writeback_cache_and_passthrough_exclude_each_other(flags: int, wanted: Wishes) -> None:
    found = agree(offer(flags), wanted)
    assert not (found.features & Init.WRITEBACK_CACHE and found.features & Init.PASSTHROUGH)
    assert LAYOUTS["init_out"].decode(found.reply)["max_stack_depth"] == (
        STACK_DEPTH if found.features & Init.PASSTHROUGH else 0
    )


def test_a_kernel_that_offers_all_grants_all_wishes() -> None:
    plain = agree(offer(), Wishes()).features
    assert plain & Init.POSIX_ACL and plain & Init.DONT_MASK and plain & Init.HANDLE_KILLPRIV_V2
    assert not plain & (Init.WRITEBACK_CACHE | Init.PASSTHROUGH | Init.NO_OPEN_SUPPORT | Init.AUTO_INVAL_DATA)
    assert agree(offer(), Wishes(passthrough=True)).features & Init.PASSTHROUGH
    assert agree(offer(), Wishes(passthrough=True, writeback=True)).features & Init.WRITEBACK_CACHE
    assert agree(offer(), Wishes(read_only=True, passthrough=True, writeback=True)).features & Init.NO_OPEN_SUPPORT
    assert agree(offer(), Wishes(trusting=False)).features & Init.AUTO_INVAL_DATA
    assert not agree(offer(), Wishes(acl=False)).features & (Init.POSIX_ACL | Init.DONT_MASK)


def test_a_read_only_mount_has_neither_writeback_nor_passthrough() -> None:
    found = agree(offer(), Wishes(read_only=True, passthrough=True, writeback=True)).features
    assert not found & (Init.WRITEBACK_CACHE | Init.PASSTHROUGH)


OLD = [Init.HANDLE_KILLPRIV_V2, Init.SETXATTR_EXT, Init.INIT_EXT, Init.PASSTHROUGH]  # since 7.33, 7.33, 7.36, 7.40


def test_features_of_older_kernels_down_to_linux_5_4() -> None:
    flags = EVERYTHING
    for newest, minor in zip(reversed(OLD), (39, 35, 32, 31), strict=True):
        flags &= ~newest
        found = agree(offer(flags, minor), Wishes(passthrough=True))
        assert found.minor == minor
        assert not found.features & newest
        assert found.features & Init.DO_READDIRPLUS and found.features & Init.PARALLEL_DIROPS
    assert not found.features & FLAGS2


@pytest.mark.parametrize(("major", "minor"), [(7, 30), (7, 0), (6, 45), (5, 1)])
def test_an_older_kernel_is_refused_with_its_version(major: int, minor: int) -> None:
    with pytest.raises(TooOldError, match=rf"FUSE {major}\.{minor}"):
        agree(offer(minor=minor, major=major), Wishes())


def test_a_newer_minor_is_answered_with_ours() -> None:
    assert agree(offer(minor=99), Wishes()).minor == MINOR
