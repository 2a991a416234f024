"""Data of open files: read, write, copy, holes, sync. See copy_file_range(2), ioctl_ficlone(2), preadv2(2)."""

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator

from overlayfs.sysio.calls import changing, restarted
from overlayfs.sysio.libc import failed, function

_FICLONE = 0x40049409  # include/uapi/linux/fs.h
_CANNOT_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM)
_CANNOT_COPY_RANGE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY)
_RANGE = 64 * 1024 * 1024  # a frozen or killed copy is noticed between two of these
_BLOCK = 1024 * 1024
_SMALL = 64 * 1024

_syncfs = function("syncfs", ctypes.c_int)
_fallocate = function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


# --- copying -----------------------------------------------------------------------------------------------


@changing
def clone_file(src_fd: int, dst_fd: int, /) -> bool:
    """Share all data of `src_fd` with `dst_fd` (FICLONE); False where the file systems cannot."""
    try:
        fcntl.ioctl(dst_fd, _FICLONE, src_fd)
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise
    return True


@changing
def copy_data(src_fd: int, dst_fd: int, size: int, /) -> int:
    """Copy the first `size` bytes into an empty file or a hole, keep holes, set its size; return the bytes copied.

    A source that has shrunk meanwhile ends in a hole.  The offset of `src_fd` moves.
    """
    if size <= _SMALL and os.fstat(src_fd).st_blocks * 512 >= size:
        copied = _copy_extent(src_fd, dst_fd, 0, size)  # without holes, which to look for would take longer
    else:
        copied = sum(_copy_extent(src_fd, dst_fd, start, end) for start, end in _extents(src_fd, size))
    os.ftruncate(dst_fd, size)
    return copied


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    start, end = next_data(fd, 0)
    while start < min(end, size):
        yield start, min(end, size)
        start, end = next_data(fd, end)


def _copy_extent(src_fd: int, dst_fd: int, start: int, end: int) -> int:
    at = start
    while at < end:
        try:
            done = os.copy_file_range(src_fd, dst_fd, min(end - at, _RANGE), at, at)
        except OSError as error:
            if error.errno not in _CANNOT_COPY_RANGE:
                raise
            done = 0
        if done == 0:  # some file systems return 0 instead of an error
            return at - start + _copy_blocks(src_fd, dst_fd, at, end)
        at += done
    return at - start


def _copy_blocks(src_fd: int, dst_fd: int, start: int, end: int) -> int:
    at = start
    while at < end and (data := os.pread(src_fd, min(end - at, _BLOCK), at)):
        at += _write_all(dst_fd, at, data)
    return at - start


@changing
def copy_range(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, length: int, /) -> int:
    """Copy up to `length` bytes between open files, shared where the file system can; return how many were copied.

    Where copy_file_range(2) does not support the pair, the first block is copied by read and write.
    """
    try:
        return os.copy_file_range(src_fd, dst_fd, length, src_offset, dst_offset)
    except OSError as error:
        if error.errno not in _CANNOT_COPY_RANGE:
            raise
    data = os.pread(src_fd, min(length, _BLOCK), src_offset)
    return _write_all(dst_fd, dst_offset, data)


# --- writing -----------------------------------------------------------------------------------------------


def _write_all(fd: int, offset: int, data: bytes | bytearray | memoryview, /) -> int:
    """Write all of `data` at `offset` and return its length.  An error after a part has been written is raised."""
    done = os.pwrite(fd, data, offset)
    if done == len(data):
        return done
    left = memoryview(data)[done:]
    while left:
        step = os.pwrite(fd, left, offset + done)
        done, left = done + step, left[step:]
    return done


write_at = changing(_write_all, "write_at")


@changing
def truncate_fd(fd: int, size: int, /) -> None:
    """Set the size of an open file."""
    os.ftruncate(fd, size)


@changing
def fallocate(fd: int, mode: int, offset: int, length: int, /) -> None:
    """Allocate, punch, zero, collapse or insert a range of an open file; `mode` as in fallocate(2)."""
    if _fallocate(fd, mode, offset, length) < 0:
        raise failed()


@changing
def fsync(fd: int, /) -> None:
    """Make data and attributes of an open file, or the names of a directory, durable."""
    os.fsync(fd)


@changing
def fdatasync(fd: int, /) -> None:
    """Make the data of an open file durable, with what is needed to read it back."""
    os.fdatasync(fd)


@changing
def syncfs(fd: int, /) -> None:
    """Make the whole file system behind a descriptor durable.  O_PATH descriptors give EBADF."""
    if _syncfs(fd) < 0:
        raise failed()


# --- reading -----------------------------------------------------------------------------------------------


def read_at(fd: int, offset: int, size: int, nowait: bool = False) -> bytes:
    """Read up to `size` bytes at `offset`; fewer only at the end of the file.

    A short reply means the end of the file to FUSE, so a read cut short by an error goes on and raises it.
    With `nowait`, BlockingIOError when not all of it is in memory (RWF_NOWAIT); where the file system does not
    support the flag, the read is a plain one.
    """
    if nowait:
        buffer = memoryview(bytearray(size))
        return bytes(buffer[: fill_at(fd, offset, buffer)])
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def fill_at(fd: int, offset: int, buffer: memoryview) -> int:
    """Fill `buffer` with data that is in memory, as `read_at` with `nowait` does; return the number of bytes read.

    A buffer that is used again saves a large read the fresh pages, which cost as much as the copying.
    """
    done = step = _fill_once(fd, offset, buffer)
    while step and done < len(buffer):
        step = _fill_once(fd, offset + done, buffer[done:])
        done += step
    return done


def _fill_once(fd: int, offset: int, buffer: memoryview) -> int:
    try:
        return os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return os.preadv(fd, [buffer], offset)
        raise


def read_into(fd: int, buffer: memoryview | bytearray, offset: int) -> int:
    """Read into `buffer` from `offset` on; return the number of bytes, which may be short, and 0 at the end."""
    return os.preadv(fd, [buffer], offset)


@restarted
def seek_data(fd: int, offset: int, whence: int, /) -> int:
    """Return where data (SEEK_DATA) or a hole (SEEK_HOLE) begins at or after `offset`; ENXIO beyond the end."""
    return os.lseek(fd, offset, whence)


def next_data(fd: int, offset: int) -> tuple[int, int]:
    """Return where the next data at or after `offset` begins, and where a hole follows it.

    If no data is left, both are the size of the file; if the file system cannot tell, all the rest is data.
    """
    try:
        start = seek_data(fd, offset, os.SEEK_DATA)
        return start, seek_data(fd, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EINVAL):
            raise
        size = os.fstat(fd).st_size
        return size if error.errno == errno.ENXIO else offset, size
