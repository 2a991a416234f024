"""The directory of a store: opened once, reached by descriptors, its small files read and replaced whole."""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.store import layout, locks
from overlayfs.tree.workdir import remove_tree

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_IN_AN_EMPTY_DISK = frozenset((b"lost+found",))
_BLOCK = 1 << 20


class StoreDirectory:
    """An open store directory. `root` and `rooms[NAME]` are descriptors; `path` is absolute."""

    def __init__(self, path: bytes, create: bool) -> None:
        self.path = os.path.abspath(path)
        self.subdirectories: dict[bytes, int] = {}
        self.root = self._open_root(create)
        try:
            self._open_rooms(create)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the descriptors back."""
        for fd in (self.root, *self.subdirectories.values()):
            if fd >= 0:
                sysio.close(fd)
        self.root = -1
        self.subdirectories = {}

    def display_path(self, *names: bytes) -> str:
        """Return the path of something in the store, for a sentence."""
        return os.fsdecode(os.path.join(self.path, *names))

    # --- opening ---------------------------------------------------------------------------------------

    def _open_root(self, create: bool) -> int:
        try:
            if create:
                os.makedirs(self.path, 0o700, exist_ok=True)
            return os.open(self.path, _DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UserError(f"there is no store at {self.display_path()}; name another one with --store") from None
        except OSError as error:
            raise UserError(
                f"cannot open the store {self.display_path()}: {error.strerror}; name another one with --store"
            ) from error

    def _open_rooms(self, create: bool) -> None:
        if not sysio.exists_at(self.root, layout.HEAD):
            self._found(create)
        self._check_format()
        for name in layout.SUBDIRECTORIES:
            self.subdirectories[name] = sysio.open_child(self.root, name, _DIRECTORY)

    def _found(self, create: bool) -> None:
        """Make a new store in an empty directory; several processes may do so at once. The head comes last."""
        ours = {*layout.SUBDIRECTORIES, layout.LOCK, layout.HEAD, *_IN_AN_EMPTY_DISK}
        strange = sorted({name for name, _ in sysio.list_dir(self.root)} - ours)
        if strange or not create:
            raise UserError(f"{self.display_path()} is not a store; name an empty or a new directory with --store")
        sysio.chmod_at(self.root, b"", 0o700)
        for name in layout.SUBDIRECTORIES:
            with contextlib.suppress(FileExistsError):
                sysio.mkdir_at(self.root, name, 0o700)
        sysio.close(sysio.open_child(self.root, layout.LOCK, os.O_RDONLY | os.O_CREAT, 0o600))
        self.subdirectories[layout.STAGING] = staging = sysio.open_child(self.root, layout.STAGING, _DIRECTORY)
        try:
            self.write(self.root, layout.HEAD, layout.head())
        finally:
            sysio.close(staging)
            del self.subdirectories[layout.STAGING]

    def _check_format(self) -> None:
        try:
            number = json.loads(self.read(layout.HEAD))["format"]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{self.display_path(layout.HEAD)} is damaged: it does not say which format this store has"
            ) from None
        if number != layout.FORMAT:
            raise UserError(
                f"the store {self.display_path()} has format {number}, this program knows format {layout.FORMAT}; "
                "use the version of overlayfs that made it"
            )

    # --- the store's lock ------------------------------------------------------------------------------

    def lock_shared(self) -> contextlib.AbstractContextManager[None]:
        """Hold the store's lock shared: nothing is taken away meanwhile."""
        return locks.hold(self.root, layout.LOCK, shared=True)

    def lock_exclusively(self) -> contextlib.AbstractContextManager[None]:
        """Hold the store's lock exclusively: nobody adds a reference meanwhile."""
        return locks.hold(self.root, layout.LOCK, shared=False)

    # --- small files -----------------------------------------------------------------------------------

    def names(self, room: bytes) -> list[bytes]:
        """Return the names in one of the rooms, sorted."""
        return sorted(name for name, _ in sysio.list_dir(self.subdirectories[room]))

    def open(self, path: bytes, flags: int = _DIRECTORY) -> int:
        """Open what lies at a path of the store, never following a link; a directory unless `flags` say otherwise."""
        return sysio.open_beneath(self.root, path, flags | os.O_NOFOLLOW)

    def exists(self, path: bytes) -> bool:
        """Return whether a path of the store exists, whatever it is."""
        try:
            sysio.close(self.open(path, os.O_PATH))
        except FileNotFoundError:
            return False
        return True

    def read(self, *names: bytes) -> bytes:
        """Return the content of a small file; `names` are joined to its path in the store. Raises FileNotFoundError."""
        fd = sysio.open_beneath(
            self.root, b"/".join(names), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        )  # not for ever at a FIFO
        try:
            return sysio.read_at(fd, 0, max(sysio.stat_at(fd, b"").st_size, 1))
        finally:
            sysio.close(fd)

    def write(self, dirfd: int, name: bytes, data: bytes) -> None:
        """Put a small file in place, whole and durable: written aside, synced, renamed, the directory synced.

        The store's lock must be held, or nobody else may know the store yet: gc empties the staging place.
        """
        with self.written(data) as temporary:
            sysio.rename_at(self.subdirectories[layout.STAGING], temporary, dirfd, name)
            sysio.fsync(dirfd)

    @contextlib.contextmanager
    def written(self, data: bytes) -> Iterator[bytes]:
        """Give the name in the staging place of a new durable file; if it is still there at the end it is removed."""
        staging = self.subdirectories[layout.STAGING]
        name = b"file-" + secrets.token_hex(8).encode()
        fd = sysio.open_child(staging, name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            sysio.write_at(fd, 0, data)
            sysio.fsync(fd)
            yield name
        finally:
            sysio.close(fd)
            with contextlib.suppress(FileNotFoundError):
                sysio.unlink_at(staging, name)

    def create_locked(
        self, subdirectory: bytes, name: bytes, fill: Callable[[int], None], *, shared: bool
    ) -> locks.HeldLock:
        """Create the directory `name` in a subdirectory, complete and already locked, and return its lock.

        `fill` is called with its descriptor. The directory is made in staging and appears by one rename, durably; the
        store's lock must be held. Raises FileExistsError if the name is in use. If this fails, gc removes the rest.
        """
        staging = self.subdirectories[layout.STAGING]
        temporary = name[:200] + b"-" + secrets.token_hex(8).encode()
        sysio.mkdir_at(staging, temporary, 0o700)
        directory = sysio.open_child(staging, temporary, _DIRECTORY)
        try:
            lock = locks.create(directory, shared=shared)
            try:
                fill(directory)
                target = self.subdirectories[subdirectory]
                sysio.rename_at(staging, temporary, target, name, sysio.RENAME_NOREPLACE)
                sysio.fsync(target)
            except BaseException:
                lock.release()
                raise
        finally:
            sysio.close(directory)
        return lock

    # --- taking away -----------------------------------------------------------------------------------

    def move_to_trash(self, room: bytes, name: bytes) -> bytes:
        """Take something out of a room in one durable step; returns its name in the trash, where `empty` ends it."""
        gone = name[:200] + b"-" + secrets.token_hex(8).encode()
        sysio.rename_at(self.subdirectories[room], name, self.subdirectories[layout.TRASH], gone)
        sysio.fsync(self.subdirectories[room])
        return gone

    def empty_trash(self) -> None:
        """Delete what lies in the trash; what another process is deleting is left to it."""
        trash = self.subdirectories[layout.TRASH]
        for name in self.names(layout.TRASH):
            try:
                fd = sysio.open_child(trash, name, os.O_RDONLY)
            except OSError:
                with contextlib.suppress(FileNotFoundError):
                    remove_tree(trash, name)
                continue
            with locks.HeldLock(fd):
                if sysio.try_lock(fd):
                    remove_tree(trash, name)
