"""The stack of one overlay: its layers opened, its upper locked, its features chosen."""

import dataclasses
import os
from contextlib import ExitStack

from overlayfs import sysio
from overlayfs.errors import MountError
from overlayfs.format import override
from overlayfs.format.origin import Origin
from overlayfs.format.xattrs import Mode
from overlayfs.fs.config import StackConfig
from overlayfs.tree.dirfds import DirFds, default_capacity
from overlayfs.tree.features import Features, find_features
from overlayfs.tree.filesystem import FileSystem, is_in_memory
from overlayfs.tree.layer import Layer, open_directory
from overlayfs.tree.upper import Upper
from overlayfs.tree.workdir import WorkDir, lock

_OVERRIDES = {1: override.ATTRIBUTES[0], 2: override.ATTRIBUTES[1]}
_READ_ONLY = Features(None, True, True, True, True, True)


class Stack:
    """Layers top first; layer 0 is the upper if there is one.

    redirects, metacopy, index: what may be written, as asked for and as the file system allows. notices: sentences
    for the user about what is off. around: (st_dev, st_ino) of the layers that the upper itself is inside of.
    syncs_at_once: no fsync of the upper waits for a disk.
    """

    def __init__(self, config: StackConfig) -> None:
        self.config = config
        self.notices: list[str] = []
        self.upper: Upper | None = None
        self.around: frozenset[tuple[int, int]] = frozenset()
        with ExitStack() as undo:
            self.dirfds = DirFds(default_capacity())
            undo.callback(self.dirfds.close)
            roots = _open_lowers(config, undo)
            mode = config.xattr_mode
            if config.upper is not None:
                self.upper = self._open_upper(config, config.upper, roots, undo)
                mode = self.upper.mode
            self._choose_features(config, mode)
            self.mode = mode
            self._read_mode = mode or config.xattr_mode or (Mode.TRUSTED if os.geteuid() == 0 else Mode.USER)
            self.lower = self._make_layers(roots, self._read_mode)
            self._undo = undo.pop_all()
        self.reference = (self.upper or self.lower[0]).filesystem
        self.syncs_at_once = config.volatile or (self.upper is not None and is_in_memory(self.upper.root))

    def _open_upper(self, config: StackConfig, path: bytes, roots: list[int], undo: ExitStack) -> Upper:
        if config.work is None:
            raise MountError("an upper directory needs a work directory on the same file system: give workdir")
        root = open_directory(path, "upper")
        holder = _Holder(root)
        undo.callback(holder.close)
        self._upper_root = holder
        work = WorkDir.open(config.work)
        undo.callback(lambda: work.close(clean=self.clean))
        self.clean = False
        _check_places(root, path, work.root, config.work, roots, config.lower)
        around = (fd for fd, lower in zip(roots, config.lower, strict=True) if _is_in(root, path, fd, lower))
        self.around = frozenset(map(_identity, around))
        lock(root, "upper", path, config.lock_wait)
        lock(work.root, "work directory", config.work, config.lock_wait)
        return _prepare_upper(config, root, work, self.dirfds)

    def _choose_features(self, config: StackConfig, mode: Mode | None) -> None:
        features = self.upper.features if self.upper is not None else _READ_ONLY
        privileged = mode is Mode.TRUSTED
        self.redirects = _choose(config.redirect_dir, privileged, mode is not None)
        self.metacopy = _choose(config.metacopy, privileged, mode is not None)
        self.index = _choose(config.index, mode is not None, mode is not None and features.handles)
        if self.upper is not None:
            self._apply_choices(self.upper)

    def _apply_choices(self, upper: Upper) -> None:
        self.notices += upper.features.missing()
        if self.index:
            upper.work.open_index()
        elif upper.work.has_index_entries():
            self.notices.append("the work directory has an index, which is off: hard links may part")
        if self.config.volatile:
            upper.work.mark_volatile()

    def _make_layers(self, roots: list[int], mode: Mode) -> tuple[Layer, ...]:
        first = 0 if self.upper is None else 1
        last = len(roots) - 1
        layers = tuple(
            Layer(first + position, root, self.dirfds, mode, lowest=position == last)
            for position, root in enumerate(roots)
        )
        for layer in layers:
            layer.hidden = self.hidden
        return layers

    @property
    def hidden(self) -> frozenset[tuple[int, int]]:
        """The directories that no layer shows: upper and work may be inside one (`lowerdir=/`)."""
        own = () if self.upper is None else (self.upper.root, self.upper.work.root)
        return self.config.hidden | {_identity(fd) for fd in own}

    # --- another upper ---------------------------------------------------------------------------------

    def open_new_upper(self, path: bytes) -> "NewUpper":
        """Open and lock an empty directory that is to be the next upper, on the file system of this one."""
        assert self.upper is not None
        return NewUpper(self, self.upper, path)

    def rotate(self, new_upper: "NewUpper", path: bytes) -> Layer:
        """Make `new_upper` the upper, and the former upper, which is at `path` now, the top layer."""
        former = self.upper
        assert former is not None
        for layer in self.lower:
            layer.index += 1
        top = Layer(1, new_upper.former_root, self.dirfds, self._read_mode, lowest=False)
        self._undo.callback(sysio.close, new_upper.former_root)
        self.upper, self.lower = new_upper.upper, (top, *self.lower)
        self.config = dataclasses.replace(self.config, lower=(path, *self.config.lower))
        for layer in self.lower:
            layer.hidden = self.hidden
        self.dirfds.forget_root(former.root)
        self._upper_root.exchange(new_upper.upper.root)
        return top

    def number(self, filesystem: FileSystem, inode: int) -> int:
        """Return the overlay's number for an inode."""
        if filesystem.tag == self.reference.tag or not self.config.xino:
            return inode
        return filesystem.number(inode, self.reference)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, top first."""
        return self.lower if self.upper is None else (self.upper, *self.lower)

    def origin_number(self, origin: Origin) -> int | None:
        """Return the number of the object that an origin mark names, if that is on a file system of the stack."""
        for layer in self.layers:
            inode = layer.filesystem.inode_of(origin)
            if inode is not None:
                return self.number(layer.filesystem, inode)
        return None

    def close(self, clean: bool) -> None:
        """Close everything; `clean`: the upper is synced, so a volatile mark may go. The locks go last."""
        self.clean = clean
        self._undo.close()


class NewUpper:
    """The next upper, and a descriptor through which the present one is read as a layer."""

    def __init__(self, stack: Stack, upper: Upper, path: bytes) -> None:
        self._present = upper
        root = open_directory(path, "upper")
        with ExitStack() as undo:
            undo.callback(sysio.close, root)
            lock(root, "upper", path, stack.config.lock_wait)
            self.upper = Upper(root, stack.dirfds, upper.features, upper.work, upper.volatile, upper.override)
            clone = sysio.clone_mount(upper.root)
            # Not a duplicate: that would keep the lock, which is for uppers.
            again = os.O_RDONLY | os.O_DIRECTORY
            self.former_root = sysio.open_child(upper.root, b"", again) if clone is None else clone
            undo.pop_all()

    def apply_attributes(self) -> None:
        """Give the root of the next upper what the present one has: owner, mode, attributes, times."""
        self.upper.copy_root_attributes(self._present)

    def close(self) -> None:
        """Close both descriptors: the rotation has failed."""
        sysio.close(self.former_root)
        sysio.close(self.upper.root)


class _Holder:
    """Owns a descriptor that may be exchanged for another one."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def exchange(self, fd: int) -> None:
        """Close the one and own the other."""
        old, self._fd = self._fd, fd
        sysio.close(old)

    def close(self) -> None:
        """Close what is owned."""
        sysio.close(self._fd)


def _choose(asked: bool | None, default: bool, possible: bool) -> bool:
    return possible and (default if asked is None else asked)


def _closed_at_end(fd: int, undo: ExitStack) -> int:
    undo.callback(sysio.close, fd)
    return fd


def _open_lowers(config: StackConfig, undo: ExitStack) -> list[int]:
    if not config.lower:
        raise MountError("no lower layer is given: name at least one directory")
    roots = []
    for path in config.lower:
        fd = open_directory(path, "lower layer")
        clone = sysio.clone_mount(fd)
        if clone is not None:
            sysio.close(fd)
        roots.append(_closed_at_end(fd if clone is None else clone, undo))
    return roots


def _prepare_upper(config: StackConfig, root: int, work: WorkDir, dirfds: DirFds) -> Upper:
    work.prepare()
    try:
        features = find_features(work, config.xattr_mode)
    except OSError as error:
        raise MountError(
            f"the upper's file system cannot hold the attributes that are asked for (xattr mode "
            f"{config.xattr_mode.value if config.xattr_mode else 'any'}): {error.strerror}"
        ) from error
    as_override = _OVERRIDES.get(config.xattr_permissions)
    upper = Upper(root, dirfds, features, work, config.volatile, as_override)
    if as_override is not None and sysio.find_xattr(root, b"", as_override) is None:
        found = sysio.stat_at(root, b"")
        upper.set_mode(root, b"", found.st_mode)
    return upper


def _check_places(
    root: int, path: bytes, work: int, work_path: bytes, roots: list[int], lowers: tuple[bytes, ...]
) -> None:
    if sysio.stat_at(root, b"").st_dev != sysio.stat_at(work, b"").st_dev:
        raise MountError(
            f"work directory {os.fsdecode(work_path)} is not on the file system of upper {os.fsdecode(path)}"
        )
    if _is_in(work, work_path, root, path) or _is_in(root, path, work, work_path):
        raise MountError(
            f"upper {os.fsdecode(path)} and work directory {os.fsdecode(work_path)} overlap: "
            f"neither may be the other or lie inside it"
        )
    for lower, lower_path in zip(roots, lowers, strict=True):
        for fd, its_path, what in ((root, path, "upper"), (work, work_path, "work directory")):
            if _is_in(lower, lower_path, fd, its_path):
                raise MountError(
                    f"lower layer {os.fsdecode(lower_path)} is the {what} {os.fsdecode(its_path)} or lies inside it, "
                    f"and a layer must not change; name another directory"
                )


def _is_in(inner: int, inner_path: bytes, outer: int, outer_path: bytes) -> bool:
    """Return whether a directory is another one or is inside it, whatever paths they were named by."""
    if _identity(inner) == _identity(outer):
        return True
    return os.path.realpath(inner_path).startswith(os.path.realpath(outer_path).rstrip(b"/") + b"/")


def _identity(fd: int) -> tuple[int, int]:
    found = sysio.stat_at(fd, b"")
    return found.st_dev, found.st_ino
