"""The overlay as a whole: the filesystem's verbs, synchronous, without FUSE.

    overlay = Overlay(StackConfig(lower=(b"/a", b"/b"), upper=b"/u", work=b"/w"))
    node = overlay.lookup(overlay.root, b"etc")
    overlay.close()

Every verb raises `OSError` with the errno that the caller of the system call shall see; EROFS where there is no upper.
Names are one component, as bytes. All calls belong on one thread, apart from what says otherwise.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.format import origin, xattrs
from overlayfs.fs import index
from overlayfs.fs.changes import Change, changes
from overlayfs.fs.config import StackConfig
from overlayfs.fs.copyup import CopyUp, CopyUpStep, Requirement
from overlayfs.fs.dir_offsets import DirOffsets
from overlayfs.fs.durability import Durability, SyncBarrier
from overlayfs.fs.explain import Holder, explain
from overlayfs.fs.files import Child, DirHandle, FileHandle, Files, children, requirement_of_open
from overlayfs.fs.lookup import Lookup
from overlayfs.fs.metadata import Attributes, Changes, Metadata, after_change
from overlayfs.fs.names import Caller, Names
from overlayfs.fs.nodes import Dir, File, Node, NodeTable
from overlayfs.fs.rotate import Rotation, holds_changes
from overlayfs.fs.space import Space
from overlayfs.fs.stack import Stack
from overlayfs.tree import staging


class Overlay:
    """One mounted or unmounted stack of layers.

    Opening it opens every layer and locks the upper; `MountError` with one sentence when that cannot be.
    """

    def __init__(self, config: StackConfig) -> None:
        self._stack = Stack(config)
        self.nodes = NodeTable(config.ino32)
        self._lookup = Lookup(self._stack, self.nodes)
        self._attributes = Metadata(self._stack, self._lookup)
        self._durability = Durability(self._stack, self._attributes)
        self._copyup = CopyUp(self._stack, self.nodes, self._lookup, self._attributes, self._durability)
        self._names = Names(self._stack, self.nodes, self._lookup, self._attributes, self._copyup)
        self.files = Files(self._stack, self.nodes, self._lookup, self._attributes, self._copyup)
        self._dir_offsets = DirOffsets(self._lookup)
        self.nodes.on_drop += [self._lookup.drop, self._dir_offsets.drop]
        self.space = Space(self._attributes, self._lookup, self.files)
        self.root = self._lookup.root

    @property
    def read_only(self) -> bool:
        """Whether there is no upper."""
        return self._stack.upper is None

    @property
    def config(self) -> StackConfig:
        """The stack as it is now: a commit adds a layer."""
        return self._stack.config

    @property
    def notices(self) -> list[str]:
        """Sentences about features that are off, and why."""
        return self._stack.notices

    @property
    def overrides(self) -> bool:
        """Whether a layer keeps owners and modes in attributes: then those of the real files say nothing."""
        return self._attributes.overrides

    @property
    def allows_suid(self) -> bool:
        """Whether every layer lies on a mount where set-id bits and capabilities count."""
        return all(layer.suid for layer in self._stack.layers)

    @property
    def allows_devices(self) -> bool:
        """Whether every layer lies on a mount where devices open."""
        return all(layer.dev for layer in self._stack.layers)

    def close(self) -> None:
        """Sync the upper, close everything and release the locks."""
        synced = self._sync_before_close()
        self.files.close()
        self.nodes.close()
        self._stack.close(clean=synced)

    def _sync_before_close(self) -> bool:
        try:
            self.sync()
        except OSError:
            return False
        return True

    # --- looking ---------------------------------------------------------------------------------------

    def lookup(self, parent: Node, name: bytes) -> Node:
        """Return the node under a name; ENOENT for none."""
        node = self._lookup.lookup(_directory(parent), name)
        if node is None:
            raise oserror(errno.ENOENT, name)
        return node

    def find(self, parent: Node, name: bytes) -> Node | None:
        """Return the node under a name, None for none: a look-up that need not raise."""
        return self._lookup.lookup(_directory(parent), name)

    def attributes(self, node: Node) -> Attributes:
        """Return the attributes of a node."""
        return self._attributes.attributes(node)

    def readlink(self, node: Node) -> bytes:
        """Return the target of a symbolic link; EINVAL for anything else."""
        return self._attributes.readlink(node)

    def statfs(self) -> os.statvfs_result:
        """Return capacity and limits; names may be shorter where whiteouts need a name of their own."""
        return self._attributes.filesystem()

    @property
    def longest_name(self) -> int:
        """The length of the longest name that can be made and removed, in bytes."""
        upper = self._stack.upper
        return 255 if upper is None or upper.features.devices else 251

    def getxattr(self, node: Node, name: bytes) -> bytes:
        """Return the value of an extended attribute; ENODATA for none."""
        return self._attributes.getxattr(node, name)

    def find_xattr(self, node: Node, name: bytes) -> bytes | None:
        """Return the same, None for none and where the file system has no such attributes."""
        return self._attributes.find_xattr(node, name)

    def listxattr(self, node: Node) -> list[bytes]:
        """Return the names of all visible extended attributes."""
        return self._attributes.listxattr(node)

    # --- attributes ------------------------------------------------------------------------------------

    def set_attributes(
        self, node: Node, changes: Changes, caller: Caller, handle: FileHandle | None = None
    ) -> Attributes:
        """Change attributes and return what they are then. `handle`: the open file of ftruncate(2) and the like."""
        requirement = requirement_of_change(changes)
        self._copyup.copy_up(node, requirement)
        try:
            self._attributes.change(node, changes, handle.node.writer if handle is not None and handle.writes else None)
        finally:
            self.files.close_unused(node)
        return after_change(lambda: self._attributes.attributes(node))

    def check_xattr(self, name: bytes) -> None:
        """Raise what a change of an extended attribute with this name would raise for its name alone."""
        self._attributes.check_xattr(name)

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute; `flags` as in setxattr(2)."""
        self._attributes.check_xattr(name)
        self._copyup.copy_up(node)
        self._attributes.setxattr(node, name, value, flags)

    def removexattr(self, node: Node, name: bytes) -> None:
        """Remove an extended attribute; ENODATA, without a copy-up, for one that is not there."""
        self._attributes.check_xattr(name)
        self._attributes.getxattr(node, name)
        self._copyup.copy_up(node)
        self._attributes.removexattr(node, name)

    # --- names -----------------------------------------------------------------------------------------

    def masked(self, parent: Node, mode: int, umask: int) -> int:
        """Return the mode of an object to be made: a default ACL in the parent goes before the umask (acl(5))."""
        if not mode & umask or self._names.has_default_acl(_directory(parent)):
            return mode
        return mode & ~umask

    def mkdir(self, parent: Node, name: bytes, mode: int, caller: Caller) -> Node:
        """Make a directory; `mode` is permission bits, the umask already applied."""
        return self._names.mkdir(_directory(parent), name, mode, caller)

    def mknod(self, parent: Node, name: bytes, mode: int, rdev: int, caller: Caller) -> Node:
        """Make a file, FIFO, socket or device."""
        return self._names.mknod(_directory(parent), name, mode, rdev, caller)

    def symlink(self, parent: Node, name: bytes, target: bytes, caller: Caller) -> Node:
        """Make a symbolic link."""
        return self._names.symlink(_directory(parent), name, target, caller)

    def create(self, parent: Node, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Node, FileHandle]:
        """Make and open a regular file; one that exists is opened unless `flags` hold O_EXCL."""
        existing = self._lookup.lookup(_directory(parent), name)
        if existing is not None and not flags & os.O_EXCL:
            return existing, self.open(existing, flags, caller)
        node, writer = self._names.create(_directory(parent), name, mode, caller)
        return node, self.files.open_created(node, writer)

    def create_unnamed(self, parent: Node, mode: int, caller: Caller) -> tuple[Node, FileHandle]:
        """Make and open a regular file without a name (O_TMPFILE); `link` gives it one."""
        node, writer = self._names.make_unnamed(_directory(parent), mode, caller)
        return node, self.files.open_created(node, writer)

    def link(self, node: Node, new_parent: Node, new_name: bytes) -> Node:
        """Give a file one more name; returns the file's node."""
        self._names.link(node, _directory(new_parent), new_name)
        return node

    def unlink(self, parent: Node, name: bytes) -> None:
        """Remove a name of anything but a directory."""
        self._names.unlink(_directory(parent), name)

    def rmdir(self, parent: Node, name: bytes) -> None:
        """Remove an empty directory."""
        self._names.rmdir(_directory(parent), name)

    def rename(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int = 0) -> None:
        """Move a name; `flags` are 0, RENAME_NOREPLACE or RENAME_EXCHANGE of renameat2(2), else EINVAL."""
        self._names.rename(_directory(parent), name, _directory(new_parent), new_name, flags)

    # --- files -----------------------------------------------------------------------------------------

    def open(self, node: Node, flags: int, caller: Caller, strip: bool | None = None) -> FileHandle:
        """Open a regular file and return a handle; `flags` as in open(2).

        strip: whether O_TRUNC clears set-id bits and capabilities; by default for every caller but root.
        """
        return self.files.open(node, flags, strip=caller.uid != 0 if strip is None else strip)

    def strip_set_id(self, node: Node) -> None:
        """Clear the set-id bits and capabilities of a file in the upper, as a write by an unprivileged user does."""
        self._attributes.strip_set_id(node)

    def read(self, handle: FileHandle, offset: int, size: int, nowait: bool = False) -> bytes:
        """Read up to `size` bytes. With `nowait`, BlockingIOError when a disk must be waited for."""
        return self.files.read(handle, offset, size, nowait)

    def write(self, handle: FileHandle, offset: int, data: bytes | memoryview) -> int:
        """Write all of `data` at `offset` and return its length."""
        return self.files.write(handle, offset, data)

    def flush(self, handle: FileHandle) -> None:
        """Report what a file system says only when a file is closed, as NFS and quotas do."""
        self.files.flush(handle)

    def fsync(self, handle: FileHandle, datasync: bool = False) -> None:
        """Make a file durable, its name included."""
        self.prepare_fsync(handle, datasync)()

    def prepare_fsync(self, handle: FileHandle, datasync: bool = False) -> Callable[[], None]:
        """Return the call that makes a file durable; any thread may make it. EBADF for a closed handle."""
        if handle.closed:
            raise oserror(errno.EBADF)
        return self._durability.of_file(handle.node, datasync)

    def release(self, handle: FileHandle | DirHandle) -> None:
        """Close the handle of a file or a directory."""
        self.files.release(handle)

    def open_dir(self, node: Node) -> DirHandle:
        """Open a directory for reading and return a handle."""
        return self.files.open_dir(node)

    def read_dir(self, handle: DirHandle, offset: int) -> Iterator[Child]:
        """Yield (name, node, next offset) from a position on; 0 begins anew. No `.` and `..`."""
        return self.files.read_dir(handle, offset)

    def read_dir_at(self, node: Node, position: int) -> Iterator[Child]:
        """Yield (name, node, next position) without a handle; positions stay true while names come and go."""
        return self._dir_offsets.read(_directory(node), position)

    def fsync_dir(self, node: Node) -> None:
        """Make the names in a directory durable."""
        self.prepare_fsync_dir(node)()

    def prepare_fsync_dir(self, node: Node) -> Callable[[], None]:
        """Return the call that makes the names in a directory durable; any thread may make it."""
        return self._durability.of_directory(_directory(node))

    def sync(self) -> None:
        """Make the upper's whole file system durable. Any thread may; without an upper there is nothing to do."""
        upper = self._stack.upper
        if upper is not None:
            sysio.syncfs(upper.sync_fd)

    def keep_open(self, kept: bool) -> None:
        """Close no descriptor that a verb may have borrowed, or do so again.

        So that another thread may look things up while a verb waits in a system call: between two of them, that is.
        """
        self._stack.dirfds.keep_open(kept)
        self.nodes.keep(kept)
        self._lookup.fresh = None

    # --- lifting, for engines --------------------------------------------------------------------------

    def next_copy_up(self, node: Node, requirement: Requirement = Requirement.METADATA) -> CopyUpStep | None:
        """Return the next step before `need` of a node is met, None when it is met."""
        return self._copyup.next_copy_up(node, requirement)

    def requirement_of_open(self, node: Node, flags: int) -> Requirement | None:
        """Return what opening with these flags needs of a node."""
        return requirement_of_open(node, flags)

    def requirement_of_change(self, changes: Changes) -> Requirement:
        """Return what a setattr needs of a node."""
        return requirement_of_change(changes)

    def requirement_of_unlink(self, node: Node) -> Requirement | None:
        """Return what removing a name of a node needs of it."""
        return Requirement.METADATA if self._names.must_copy_up_counted(node) else None

    def requirements_of_rename(self, node: Node) -> Iterator[tuple[Node, Requirement]]:
        """Yield the nodes that must be lifted before this one can move: itself, or a tree that cannot be redirected."""
        if isinstance(node, Dir) and self._names.must_copy_tree(node):
            return self._names.tree_to_copy_up(node)
        return iter(((node, Requirement.METADATA),))

    # --- for a commit ----------------------------------------------------------------------------------

    @property
    def upper_root(self) -> int:
        """The descriptor of the upper directory, borrowed; EROFS without one."""
        return self._attributes.upper.root

    def identities(self) -> set[tuple[int, int]]:
        """Return (st_dev, st_ino) of upper, work and the layers: of the directories, whatever paths they have.

        A layer that holds the upper (`lowerdir=/`) is left out: a place outside of it could not be named.
        """
        found = (sysio.stat_at(layer.root, b"") for layer in self._stack.lower)
        return {(each.st_dev, each.st_ino) for each in found} - self._stack.around | self._stack.hidden

    def file_system_types(self) -> list[int]:
        """Return the type of each layer's file system, top first, as the f_type of statfs(2)."""
        return [sysio.fs_type(layer.root) for layer in self._stack.layers]

    def view_config(self) -> StackConfig:
        """Return the stack in which the upper is just the top layer: what a commit of it would show."""
        upper, *lower = (_path_of(fd) for fd in (self.upper_root, *(layer.root for layer in self._stack.lower)))
        return StackConfig(lower=(upper, *lower), xattr_mode=self._stack.mode, hidden=self._stack.hidden)

    def mark_prefixes(self) -> tuple[bytes, ...]:
        """Return the prefix of the attributes that carry marks in the upper; none where it has no attributes."""
        return () if self._stack.mode is None else (xattrs.prefix(self._stack.mode),)

    def has_unlinked_twins(self, names: Mapping[tuple[int, int], int]) -> bool:
        """Return whether an entry of the index has more names in the union than `names` counts in the upper."""
        return index.has_unlinked_twins(self._attributes.upper, names)

    def index_name_of(self, node: Node) -> bytes | None:
        """Return the name of the index entry that stands for a lower file, of this or a like stack, or None."""
        return index.name_of(self._attributes.upper, node) if isinstance(node, File) else None

    def pin_indexed(self, node: Node) -> int:
        """Return an O_PATH descriptor of the upper file that the index puts in a lower one's place; ENOENT for none."""
        return index.pin(self._attributes.upper, node)

    def lasting_origin(self, pin: int) -> bytes | None:
        """Return the origin mark that a pinned object of the upper keeps when its `nlink` and `metacopy` go."""
        found = self._lookup.lasting_origin(self._attributes.upper.marks_at(pin, b""))
        return None if found is None else origin.encode(found)

    def copy_directory(self, view: "Overlay", node: Dir, dirfd: int, name: bytes) -> None:
        """Make a directory in a layer that is becoming of our upper, as copying it up would, without what is in it.

        `node` is one of `view`, a read-only view of the same stack.
        """
        source = view._copyup.directory_source(node)
        try:
            staging.build_directory(self._attributes.upper, source, dirfd, name)
        finally:
            source.close()

    def resolve(self, path: bytes) -> Node:
        """Return the node at a path of the overlay; ENOENT, ENOTDIR. Symbolic links are not followed."""
        node: Node = self.root
        for name in filter(None, path.split(b"/")):
            node = self.lookup(node, name)
        return node

    def list_names(self, node: Node) -> list[bytes]:
        """Return the visible names in a directory, also of what cannot be looked at."""
        directory = _directory(node)
        names = ((name, 0) for name in self._lookup.listing(directory))
        return [child.name for child in children(self._lookup, directory, names)]

    # --- for a commit that moves the upper ---------------------------------------------------------------

    @property
    def is_changed(self) -> bool:
        """Whether the upper holds anything, or its root shows other attributes than the layers below."""
        return holds_changes(self._stack)

    def rotation(self) -> Rotation:
        """Return what lets the upper become a layer while the tree, its handles and its numbers live on."""
        return Rotation(self._stack, self.nodes, self._lookup, self._attributes, self._copyup)

    @property
    def syncs_at_once(self) -> bool:
        """Whether an fsync has nothing to wait for: no disk, and no commit that holds it."""
        return self._stack.syncs_at_once and self._durability.barrier is None

    def hold_syncs(self) -> SyncBarrier:
        """Let every fsync from now on wait until the barrier that is returned is finished, and given back."""
        self._durability.barrier = SyncBarrier()
        return self._durability.barrier

    def release_syncs(self, barrier: SyncBarrier, error: OSError | None = None) -> None:
        """Let those who wait go on; with `error` they fail."""
        barrier.finish(error)
        if self._durability.barrier is barrier:
            self._durability.barrier = None

    # --- views -----------------------------------------------------------------------------------------

    def changes(self) -> Iterator[Change]:
        """Yield what the upper changes: (b"A" | b"C" | b"D", path), sorted by path."""
        return changes(self._stack, self._lookup)

    def explain(self, path: bytes) -> list[Holder]:
        """Return what each layer holds at a path of the overlay, top first: which one gives it, what is hidden."""
        return explain(self._stack, self._lookup, path)


def requirement_of_change(changes: Changes) -> Requirement:
    """Return what a setattr needs: the data only when a part of it stays."""
    if changes.size is None:
        return Requirement.METADATA
    return Requirement.DATA if changes.size > 0 else Requirement.TRUNCATED


def _path_of(fd: int) -> bytes:
    # Relative paths and mounts made since do not lead elsewhere: the descriptor is what was opened.
    return b"/proc/self/fd/%d" % fd


def _directory(node: Node) -> Dir:
    if not isinstance(node, Dir):
        raise oserror(errno.ENOTDIR)
    return node


__all__ = ["Attributes", "Caller", "Changes", "Child", "File", "Node", "Overlay", "Requirement", "StackConfig"]
