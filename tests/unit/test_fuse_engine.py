"""How an error of a request becomes an errno."""

import errno
import logging

import pytest

from overlayfs.fuse.engine import reply_errno


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EDQUOT])
def test_the_errno_of_a_layer_reaches_the_caller(code: int) -> None:
    assert reply_errno(OSError(code, "text"), "WRITE") == code


def test_enosys_of_a_layer_does_not_switch_a_request_off_for_good() -> None:
    assert reply_errno(OSError(errno.ENOSYS, "text"), "SETXATTR") == errno.EOPNOTSUPP


def test_lack_of_memory_has_its_errno() -> None:
    assert reply_errno(MemoryError(), "READ") == errno.ENOMEM


@pytest.mark.parametrize("error", [KeyError(7), OSError("no number"), AssertionError(), RecursionError()])
def test_a_defect_is_an_io_error_with_a_trace(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert reply_errno(error, "RENAME") == errno.EIO
    assert "RENAME" in caplog.text
    assert type(error).__name__ in caplog.text
