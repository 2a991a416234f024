"""What the kernel may remember."""

import os

import pytest

from overlayfs.fuse.caching_policy import FOREVER, caching


def test_names_absences_and_attributes_are_kept_for_ever() -> None:
    policy = caching()
    assert (policy.entry, policy.negative, policy.attributes) == (FOREVER, FOREVER, FOREVER)
    assert policy.keep_cache
    assert not policy.writeback


@pytest.mark.parametrize("timeout", [0.0, 1.5])
def test_a_given_timeout_bounds_all_of_them(timeout: float) -> None:
    policy = caching(timeout)
    assert (policy.entry, policy.negative, policy.attributes) == (timeout, timeout, timeout)
    assert not policy.keep_cache


def test_a_very_long_timeout_means_for_ever() -> None:
    assert caching(1e9) == caching()


@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_append_and_direct_flags_are_removed(access: int) -> None:
    flags = access | os.O_APPEND | os.O_DIRECT | os.O_TRUNC | os.O_NOFOLLOW
    assert caching().backing_flags(flags) == access | os.O_TRUNC | os.O_NOFOLLOW


def test_the_writeback_cache_needs_readable_handles() -> None:
    policy = caching(writeback=True)
    assert policy.backing_flags(os.O_WRONLY | os.O_CREAT) == os.O_RDWR | os.O_CREAT
    assert policy.backing_flags(os.O_RDONLY) == os.O_RDONLY
