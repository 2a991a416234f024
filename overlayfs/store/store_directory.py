"""The directory of a store: opened once, reached through descriptors; small files are read and replaced whole."""

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
_IN_AN_EMPTY_FILE_SYSTEM = frozenset((b"lost+found",))


class StoreDirectory:
    """An open store directory. `root` and `rooms[NAME]` are descriptors; `path` is absolute."""

    def __init__(self, path: bytes, create: bool) -> None:
        self.path = os.path.abspath(path)
        self.subdirectories: dict[bytes, int] = {}
        self.root = self._open_root(create)
        try:
            self._open_subdirectories(create)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self.root, *self.subdirectories.values()):
            if fd >= 0:
                sysio.close(fd)
        self.root = -1
        self.subdirectories = {}

    def display_path(self, *names: bytes) -> str:
        """Return the path of a file of the store for a message; `names` are joined."""
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

    def _open_subdirectories(self, create: bool) -> None:
        if not sysio.exists_at(self.root, layout.FORMAT_FILE):
            self._initialize(create)
        self._check_format()
        for name in layout.SUBDIRECTORIES:
            self.subdirectories[name] = sysio.open_child(self.root, name, _DIRECTORY)

    def _initialize(self, create: bool) -> None:
        """Make an empty directory a store; several processes may do so at once. The format file comes last."""
        expected = {*layout.SUBDIRECTORIES, layout.LOCK, layout.FORMAT_FILE, *_IN_AN_EMPTY_FILE_SYSTEM}
        unexpected = sorted({name for name, _ in sysio.list_dir(self.root)} - expected)
        if unexpected or not create:
            raise UserError(f"{self.display_path()} is not a store; name an empty or a new directory with --store")
        sysio.chmod_at(self.root, b"", 0o700)
        for name in layout.SUBDIRECTORIES:
            with contextlib.suppress(FileExistsError):
                sysio.mkdir_at(self.root, name, 0o700)
        sysio.close(sysio.open_child(self.root, layout.LOCK, os.O_RDONLY | os.O_CREAT, 0o600))
        self.subdirectories[layout.STAGING] = staging = sysio.open_child(self.root, layout.STAGING, _DIRECTORY)
        try:
            self.write(self.root, layout.FORMAT_FILE, layout.format_document())
        finally:
            sysio.close(staging)
            del self.subdirectories[layout.STAGING]

    def _check_format(self) -> None:
        try:
            number = json.loads(self.read(layout.FORMAT_FILE))["format"]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{self.display_path(layout.FORMAT_FILE)} is damaged: it does not say which format this store has"
            ) from None
        if number != layout.FORMAT:
            raise UserError(
                f"the store {self.display_path()} has format {number}, this program knows format {layout.FORMAT}; "
                "use the version of overlayfs that made it"
            )

    # --- the store's lock ------------------------------------------------------------------------------

    def lock_shared(self) -> contextlib.AbstractContextManager[None]:
        """Hold the store's lock shared within the context: no process removes anything meanwhile."""
        return locks.hold(self.root, layout.LOCK, shared=True)

    def lock_exclusively(self) -> contextlib.AbstractContextManager[None]:
        """Hold the store's lock exclusively within the context: no process adds a reference meanwhile."""
        return locks.hold(self.root, layout.LOCK, shared=False)

    # --- small files -----------------------------------------------------------------------------------

    def names(self, subdirectory: bytes) -> list[bytes]:
        """Return the names in a subdirectory, sorted."""
        return sorted(name for name, _ in sysio.list_dir(self.subdirectories[subdirectory]))

    def open(self, path: bytes, flags: int = _DIRECTORY) -> int:
        """Open a path of the store without following symbolic links; a directory unless `flags` say otherwise."""
        return sysio.open_beneath(self.root, path, flags | os.O_NOFOLLOW)

    def exists(self, path: bytes) -> bool:
        """Return whether a path of the store exists, of any type."""
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
        """Write a small file atomically and durably: written in staging, synced, renamed, the directory synced.

        The store's lock must be held, because gc empties staging, or no other process may know the store yet.
        """
        with self._temporary_file(data) as temporary:
            sysio.rename_at(self.subdirectories[layout.STAGING], temporary, dirfd, name)
            sysio.fsync(dirfd)

    @contextlib.contextmanager
    def _temporary_file(self, data: bytes) -> Iterator[bytes]:
        """Give the name of a new, synced file in staging; it is removed at the end unless it was renamed."""
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

    # --- removing -----------------------------------------------------------------------------------

    def move_to_trash(self, subdirectory: bytes, name: bytes) -> bytes:
        """Move an entry of a subdirectory to the trash, atomically and durably; return its name there."""
        trashed = name[:200] + b"-" + secrets.token_hex(8).encode()
        sysio.rename_at(self.subdirectories[subdirectory], name, self.subdirectories[layout.TRASH], trashed)
        sysio.fsync(self.subdirectories[subdirectory])
        return trashed

    def empty_trash(self) -> None:
        """Delete the content of the trash, except what another process is deleting."""
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
