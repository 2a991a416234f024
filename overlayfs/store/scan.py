"""Scanning a layer: one thread walks the tree in order, several read attributes and content.

A layer may contain anything: names of any bytes, links, FIFOs, devices, a tree deeper than the interpreter's stack. It
is read through descriptors, no symbolic link is followed, and only regular files are opened. An error does not end the
scan: it is yielded with its path.
"""

import errno
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import xxhash

from overlayfs import sysio
from overlayfs.format import whiteout
from overlayfs.store.entries import Entry, Type, is_metadata_only, is_portable
from overlayfs.tree.dirfds import SPARE, DirFds
from overlayfs.tree.layer import join

Progress = Callable[[int, int], None]
"""progress(entries, bytes): called periodically with the number of entries and bytes of content done so far."""

_BATCH_ENTRIES = 64
_BATCH_BYTES = 4 << 20
_AHEAD = 4  # batches queued for each thread
_BUFFER = 1 << 20  # xxhash releases the GIL for blocks of this size
_SMALL = 128 * 1024
_ZEROS = memoryview(bytes(_BUFFER))
_PROGRESS_INTERVAL = 0.1  # seconds between two calls of `progress` while one large file is read
_CHANGED = "changed while it was read"
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW
_TYPES = {
    stat.S_IFREG: Type.FILE,
    stat.S_IFDIR: Type.DIR,
    stat.S_IFLNK: Type.SYMLINK,
    stat.S_IFIFO: Type.FIFO,
    stat.S_IFSOCK: Type.SOCKET,
    stat.S_IFCHR: Type.CHAR,
    stat.S_IFBLK: Type.BLOCK,
}


class Scanned(NamedTuple):
    """An entry as it was read; with an error, only what the walk found out, without content and attributes."""

    entry: Entry
    error: OSError | None = None


class _Found(NamedTuple):
    """What the walk found out about an entry. link: the first path of the same inode, if this is another one."""

    directory: bytes
    name: bytes
    stat: os.stat_result | None
    link: bytes | None = None
    error: OSError | None = None


def required(scanned: Scanned) -> Entry:
    """Return the entry; raises the OSError it came with, with its path."""
    error = scanned.error
    if error is not None:
        raise OSError(error.errno, error.strerror, scanned.entry.path) from error
    return scanned.entry


def scan(root: int, threads: int | None = None, progress: Progress | None = None) -> Generator[Scanned, None, None]:
    """Yield every entry of the tree below the descriptor `root`, in the order of a manifest, the root first.

    Memory does not grow with the tree, except for one listing per level and one path per inode of several names.
    Closing the generator stops the threads, which use `root` until then.
    """
    state = _State(progress)
    pool = ThreadPoolExecutor(threads or _usual_threads(), "scan")
    ahead = (threads or _usual_threads()) * _AHEAD
    pending: deque[Future[list[Scanned]]] = deque()
    try:
        for batch in _batches(_Walk(root).run()):
            pending.append(pool.submit(_read_batch, root, batch, state))
            if len(pending) > ahead:
                yield from state.result(pending.popleft())
        while pending:
            yield from state.result(pending.popleft())
    finally:
        state.stopped = True
        pool.shutdown(cancel_futures=True)


def _usual_threads() -> int:
    # More threads than CPUs: while one reads from the disk, another hashes.
    return max(4, min(16, os.cpu_count() or 1))


class _State:
    """State shared by the threads and the consumer of the scan."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._entries = 0
        self._bytes = 0
        self.stopped = False

    def add(self, size: int) -> None:
        """Count bytes that were read."""
        with self._lock:
            self._bytes += size

    def result(self, future: Future[list[Scanned]]) -> list[Scanned]:
        """Wait for a batch, calling `progress` meanwhile."""
        while self._progress is not None and not wait((future,), _PROGRESS_INTERVAL).done:
            self._progress(self._entries, self._bytes)
        found = future.result()
        self._entries += len(found)
        if self._progress is not None:
            self._progress(self._entries, self._bytes)
        return found


# --- the walk ----------------------------------------------------------------------------------------------


class _Walk:
    """Walks the tree in order, in one thread."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._dirfds = DirFds(2 * SPARE, errno.EXDEV)
        self._links: dict[tuple[int, int], tuple[bytes, int]] = {}  # first path, names still to come

    def run(self) -> Iterator[_Found]:
        """Yield all entries, the root first."""
        try:
            names, error = self._names(b"")
            yield _Found(b"", b"", sysio.stat_at(self._root, b""), error=error)
            pending = [(b"", names)]
            while pending:
                directory, left = pending[-1]
                name = next(left, None)
                if name is None:
                    pending.pop()
                    continue
                found = self._look(directory, name)
                if found.stat is not None and stat.S_ISDIR(found.stat.st_mode):
                    names, error = self._names(join(directory, name))
                    found = found._replace(error=error)
                    pending.append((join(directory, name), names))
                yield found
        finally:
            self._dirfds.close()

    def _names(self, path: bytes) -> tuple[Iterator[bytes], OSError | None]:
        try:
            return iter(sorted(name for name, _ in sysio.list_dir(self._dirfds.get(self._root, path)))), None
        except OSError as error:
            return iter(()), error

    def _look(self, directory: bytes, name: bytes) -> _Found:
        try:
            found = sysio.stat_at(self._dirfds.get(self._root, directory), name)
        except OSError as error:
            return _Found(directory, name, None, error=error)
        return _Found(directory, name, found, self._first_path(found, directory, name))

    def _first_path(self, found: os.stat_result, directory: bytes, name: bytes) -> bytes | None:
        if found.st_nlink < 2 or stat.S_ISDIR(found.st_mode) or _is_whiteout(found):
            return None
        key = (found.st_dev, found.st_ino)
        first, left = self._links.pop(key, (None, found.st_nlink))
        if left > 1:
            self._links[key] = (first if first is not None else join(directory, name), left - 1)
        return first


def _is_whiteout(found: os.stat_result) -> bool:
    return whiteout.is_device_whiteout(found.st_mode, found.st_rdev)


def _batches(found: Iterator[_Found]) -> Iterator[list[_Found]]:
    batch: list[_Found] = []
    size = 0
    for each in found:
        batch.append(each)
        size += each.stat.st_size if each.stat is not None and stat.S_ISREG(each.stat.st_mode) else 0
        if len(batch) == _BATCH_ENTRIES or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- attributes and content --------------------------------------------------------------------------------


def _read_batch(root: int, batch: list[_Found], state: _State) -> list[Scanned]:
    reader = _Reader(root, state)
    try:
        return [reader.read(found) for found in batch]
    finally:
        reader.close()


class _Reader:
    """Reads the entries that the walk has found, one reader per thread; keeps the last entry's directory open."""

    def __init__(self, root: int, state: _State) -> None:
        self._root = root
        self._state = state
        self._path = b""
        self._dirfd = root
        self._buffer = memoryview(bytearray(_SMALL))

    def close(self) -> None:
        """Close the directory."""
        if self._dirfd != self._root:
            sysio.close(self._dirfd)
        self._dirfd, self._path = self._root, b""

    def read(self, found: _Found) -> Scanned:
        """Return the entry, complete or with an error."""
        path = join(found.directory, found.name)
        if found.stat is None:
            return Scanned(Entry(path=path, type=Type.FILE), found.error)
        if _is_whiteout(found.stat):
            return Scanned(Entry(path=path, type=Type.WHITEOUT), found.error)
        try:
            return Scanned(self._entry(found, found.stat, path), found.error)
        except OSError as error:
            return Scanned(_known(path, found.stat, found.link), error)

    def _entry(self, found: _Found, about: os.stat_result, path: bytes) -> Entry:
        dirfd = self._directory(found.directory)
        attributes = _xattrs(dirfd, found.name)
        kind = stat.S_IFMT(about.st_mode)
        target = sysio.readlink_at(dirfd, found.name) if kind == stat.S_IFLNK else None
        xxh3 = None
        if kind == stat.S_IFREG and found.link is None and not is_metadata_only(attributes):
            xxh3 = self._hash(dirfd, found.name, about)
        return _known(path, about, found.link, target, attributes, xxh3)

    def _directory(self, path: bytes) -> int:
        if path != self._path:
            self.close()
            self._dirfd = sysio.open_beneath(self._root, path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
            self._path = path
        return self._dirfd

    def _hash(self, dirfd: int, name: bytes, about: os.stat_result) -> str:
        fd = _open(dirfd, name)
        try:
            now = sysio.stat_at(fd, b"")
            if not stat.S_ISREG(now.st_mode) or (now.st_dev, now.st_ino) != (about.st_dev, about.st_ino):
                raise _changed(name)
            digest, size = _hash_content(fd, about.st_size, self._buffer, self._state)
        finally:
            sysio.close(fd)
        if size != about.st_size:
            raise _changed(name)
        return digest


def _changed(name: bytes) -> OSError:
    return OSError(errno.ESTALE, _CHANGED, name)


def _known(
    path: bytes,
    about: os.stat_result,
    link: bytes | None,
    target: bytes | None = None,
    attributes: tuple[tuple[bytes, bytes], ...] = (),
    xxh3: str | None = None,
) -> Entry:
    kind = stat.S_IFMT(about.st_mode)
    return Entry(
        path=path,
        type=_TYPES[kind],
        mode=stat.S_IMODE(about.st_mode) if kind != stat.S_IFLNK else 0o777,
        uid=about.st_uid,
        gid=about.st_gid,
        size=about.st_size if kind == stat.S_IFREG else 0,
        mtime_ns=about.st_mtime_ns,
        rdev=about.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
        target=target,
        xattrs=attributes,
        link=link,
        xxh3=xxh3,
    )


def _xattrs(dirfd: int, name: bytes) -> tuple[tuple[bytes, bytes], ...]:
    names = sysio.listxattr_at(dirfd, name)
    if not names:
        return ()
    return tuple((each, sysio.getxattr_at(dirfd, name, each)) for each in sorted(names) if is_portable(each))


def _open(dirfd: int, name: bytes) -> int:
    try:
        return sysio.open_child(dirfd, name, _READ | os.O_NOATIME)
    except PermissionError:  # open(2): only the owner and root may use O_NOATIME
        return sysio.open_child(dirfd, name, _READ)


def hash_file(fd: int) -> tuple[str, int]:
    """Return the xxh3-128 of an open file in hex, and its size in bytes."""
    return _hash_large(fd, memoryview(bytearray(_BUFFER)), _State(None))


def _hash_content(fd: int, size: int, buffer: memoryview, state: _State) -> tuple[str, int]:
    """Return the xxh3-128 of an open file in hex and its size in bytes; `size` is the expected size."""
    if size >= len(buffer):
        return _hash_large(fd, memoryview(bytearray(_BUFFER)), state)
    count = sysio.read_into(fd, buffer, 0)  # less than the buffer: this is the end of the file
    state.add(count)
    return xxhash.xxh3_128_hexdigest(buffer[:count]), count


def _hash_large(fd: int, buffer: memoryview, state: _State) -> tuple[str, int]:
    hasher = xxhash.xxh3_128()
    offset = hole = 0
    while not state.stopped:
        if offset >= hole:
            data, hole = sysio.next_data(fd, offset)
            _add_zeros(hasher, data - offset, state)
            offset = max(data, offset)
        count = sysio.read_into(fd, buffer[: max(hole - offset, 0)], offset)
        if not count:
            break
        hasher.update(buffer[:count])
        offset += count
        state.add(count)
    return hasher.hexdigest(), offset


def _add_zeros(hasher: xxhash.xxh3_128, count: int, state: _State) -> None:
    """Hash a hole without reading it: reading would fill pages with zeros, which costs a hundred times as much."""
    while count > 0 and not state.stopped:
        piece = min(count, len(_ZEROS))
        hasher.update(_ZEROS[:piece])
        state.add(piece)
        count -= piece
