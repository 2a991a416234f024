"""The overlay as a whole: the filesystem's verbs, synchronous, without FUSE.

    overlay = Overlay(StackConfig(lower=(b"/a", b"/b"), upper=b"/u", work=b"/w"))
    node = overlay.lookup(overlay.root, b"etc")
    overlay.names.mkdir(node, b"new", 0o755, Caller(0, 0))
    overlay.close()

Every verb raises `OSError` with the errno for the caller of the system call; EROFS where there is no upper. Names are
one component, as bytes. All calls belong on one thread, unless their docstring says otherwise.
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
from overlayfs.fs.copyup import CopyUp
from overlayfs.fs.core import Core
from overlayfs.fs.dir_offsets import DirOffsets
from overlayfs.fs.durability import Durability, SyncBarrier
from overlayfs.fs.explain import Holder, explain
from overlayfs.fs.files import FileHandle, Files
from overlayfs.fs.lookup import Found
from overlayfs.fs.metadata import Attributes, Changes, Metadata
from overlayfs.fs.names import Caller, Names
from overlayfs.fs.nodes import Dir, File, Node, as_dir, close_unused_backing
from overlayfs.fs.real_objects import after_change
from overlayfs.fs.requirements import VerbRequirements
from overlayfs.fs.rotate import Rotation, holds_changes
from overlayfs.fs.space import Space
from overlayfs.tree import staging


class Overlay:
    """One mounted or unmounted stack of layers.

    Opening it opens every layer and locks the upper; `MountError` with one sentence when that fails. Its verbs are in
    groups: `files` (open files and directories), `names` (what creates, links, moves and removes), `metadata`
    (attributes), `space` (holes, ranges and flags), `dir_offsets` (reading directories without opening them); those
    that combine groups are methods of the overlay itself. `requirements` says what each verb needs in the upper, and
    `copyup` brings it there. `nodes` has all nodes by number.
    """

    def __init__(self, config: StackConfig) -> None:
        self._core = core = Core(config)
        self._stack, self._lookup, self._objects = core.stack, core.lookup, core.objects
        self.nodes = core.nodes
        self.root = core.lookup.root
        self.find = core.lookup.find  # each lookup of the kernel calls it
        self._durability = Durability(core)
        self.copyup = CopyUp(core, self._durability)
        self.metadata = Metadata(core)
        self.requirements = VerbRequirements(core, self.metadata, self.copyup.links)
        self.names = Names(core, self.metadata, self.copyup, self.requirements)
        self.files = Files(core, self.metadata, self.copyup, self.requirements)
        self.space = Space(core, self.files)
        self.dir_offsets = DirOffsets(core.lookup)
        self.nodes.on_drop += [core.lookup.listings.drop, self.dir_offsets.drop]

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
        return self.metadata.overrides

    @property
    def allows_suid(self) -> bool:
        """Whether every layer is on a mount where set-id bits and capabilities have an effect."""
        return all(layer.suid for layer in self._stack.layers)

    @property
    def allows_devices(self) -> bool:
        """Whether every layer is on a mount where devices can be opened."""
        return all(layer.dev for layer in self._stack.layers)

    @property
    def open_handles(self) -> int:
        """How many files and directories are open."""
        return len(self.files)

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

    # --- lookup ----------------------------------------------------------------------------------------

    def lookup(self, parent: Node, name: bytes) -> Node:
        """Return the node under a name; ENOENT for none."""
        node = self._lookup.lookup(parent, name)
        if node is None:
            raise oserror(errno.ENOENT, name)
        return node

    def resolve(self, path: bytes) -> Node:
        """Return the node at a path of the overlay; ENOENT, ENOTDIR. Symbolic links are not followed."""
        node: Node = self.root
        for name in filter(None, path.split(b"/")):
            node = self.lookup(node, name)
        return node

    def list_names(self, node: Node) -> list[bytes]:
        """Return the visible names in a directory, also of what cannot be looked up."""
        directory = as_dir(node)
        names = ((name, 0) for name in self._lookup.listing(directory))
        return [child.name for child in self._lookup.children(directory, names)]

    # --- attributes ------------------------------------------------------------------------------------

    def attributes(self, node: Node) -> Attributes:
        """Return the attributes of a node."""
        return self.metadata.attributes(node)

    def set_attributes(self, node: Node, changes: Changes) -> Attributes:
        """Change attributes and return what they are then."""
        self.copyup.copy_up_all(self.requirements.set_attributes(node, changes))
        try:
            self.metadata.change(node, changes)
        finally:
            close_unused_backing(node)
        return after_change(lambda: self.metadata.attributes(node))

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute; `flags` as in setxattr(2)."""
        self.copyup.copy_up_all(self.requirements.setxattr(node, name))
        self.metadata.setxattr(node, name, value, flags)

    def removexattr(self, node: Node, name: bytes) -> None:
        """Remove an extended attribute; ENODATA, without a copy-up, for one that is not there."""
        self.copyup.copy_up_all(self.requirements.removexattr(node, name))
        self.metadata.removexattr(node, name)

    # --- files -----------------------------------------------------------------------------------------

    def create(self, parent: Node, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Found, FileHandle]:
        """Make and open a regular file; one that exists is opened unless `flags` have O_EXCL."""
        existing = None if flags & os.O_EXCL else self._lookup.find(parent, name)
        if existing is not None:
            return existing, self.files.open(existing[0], flags, strip=caller.uid != 0)
        made, writer = self.names.create(parent, name, mode, caller)
        return made, self.files.open_created(made[0], writer)

    def create_unnamed(self, parent: Node, mode: int, caller: Caller) -> tuple[Found, FileHandle]:
        """Make and open a regular file without a name (O_TMPFILE); `names.link` gives it one."""
        made, writer = self.names.make_unnamed(parent, mode, caller)
        return made, self.files.open_created(made[0], writer)

    # --- durability ------------------------------------------------------------------------------------

    def fsync(self, handle: FileHandle, datasync: bool = False) -> None:
        """Make a file durable, its name included."""
        self.prepare_fsync(handle, datasync)()

    def prepare_fsync(self, handle: FileHandle, datasync: bool = False) -> Callable[[], None]:
        """Return the call that makes a file durable; any thread may make it. EBADF for a closed handle."""
        if handle.closed:
            raise oserror(errno.EBADF)
        return self._durability.of_file(handle.node, datasync)

    def prepare_fsync_dir(self, node: Node) -> Callable[[], None]:
        """Return the call that makes the names in a directory durable; any thread may make it."""
        return self._durability.of_directory(as_dir(node))

    def sync(self) -> None:
        """Make the upper's whole file system durable. Any thread may; without an upper there is nothing to do."""
        upper = self._stack.upper
        if upper is not None:
            sysio.syncfs(upper.sync_fd)

    def keep_open(self, kept: bool) -> None:
        """Close no descriptor that a verb may have borrowed while `kept`.

        Then another thread may look things up while a verb is blocked in a system call.
        """
        self._stack.dirfds.keep_open(kept)
        self.nodes.keep(kept)

    # --- for a commit ----------------------------------------------------------------------------------

    @property
    def upper_root(self) -> int:
        """The descriptor of the upper directory, borrowed; EROFS without one."""
        return self._objects.upper.root

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
        return index.has_unlinked_twins(self._objects.upper, names)

    def index_name_of(self, node: Node) -> bytes | None:
        """Return the name of the index entry that stands for a lower file, of this or a like stack, or None."""
        return index.name_of(self._objects.upper, node) if isinstance(node, File) else None

    def pin_indexed(self, node: Node) -> int:
        """Return an O_PATH descriptor of the upper file that the index puts in a lower one's place; ENOENT for none."""
        return index.pin(self._objects.upper, node)

    def lasting_origin(self, pin: int) -> bytes | None:
        """Return the origin mark that a pinned object of the upper keeps when its `nlink` and `metacopy` go."""
        found = self._lookup.origins.lasting(self._objects.upper.marks_at(pin, b""))
        return None if found is None else origin.encode(found)

    def copy_directory(self, view: "Overlay", node: Dir, dirfd: int, name: bytes) -> None:
        """Make a directory in a layer that is becoming of our upper, as copying it up would, without what is in it.

        `node` is one of `view`, a read-only view of the same stack.
        """
        source = view.copyup.directory_source(node)
        try:
            staging.build_directory(self._objects.upper, source, dirfd, name)
        finally:
            source.close()

    # --- for a commit that moves the upper ---------------------------------------------------------------

    @property
    def is_changed(self) -> bool:
        """Whether the upper has any entries, or other attributes of the root than the layers have."""
        return holds_changes(self._stack)

    def rotation(self) -> Rotation:
        """Return what lets the upper become a layer while the tree, its handles and its numbers live on."""
        return Rotation(self._core, self.copyup)

    @property
    def syncs_at_once(self) -> bool:
        """Whether an fsync has nothing to wait for: no disk, and no commit that holds it."""
        return self._stack.syncs_at_once and self._durability.barrier is None

    def hold_syncs(self) -> SyncBarrier:
        """Let every fsync from now on wait until the barrier that is returned is finished, and given back."""
        self._durability.barrier = SyncBarrier()
        return self._durability.barrier

    def release_syncs(self, barrier: SyncBarrier, error: OSError | None = None) -> None:
        """Let the waiting calls go on; with `error` they fail."""
        barrier.finish(error)
        if self._durability.barrier is barrier:
            self._durability.barrier = None

    # --- views -----------------------------------------------------------------------------------------

    def changes(self) -> Iterator[Change]:
        """Yield what the upper changes: (b"A" | b"C" | b"D", path), sorted by path."""
        return changes(self._stack, self._lookup)

    def explain(self, path: bytes) -> list[Holder]:
        """Return what each layer holds at a path of the overlay, top first: which one gives it, what is hidden."""
        return explain(self._core, path)


def _path_of(fd: int) -> bytes:
    # Relative paths and mounts made since do not lead elsewhere: the descriptor is what was opened.
    return b"/proc/self/fd/%d" % fd
