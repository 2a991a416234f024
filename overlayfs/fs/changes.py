"""What the upper changes, as lines that container users know: A added, C changed, D deleted."""

from collections.abc import Iterator
from typing import NamedTuple

from overlayfs.fs.lookup import Lookup
from overlayfs.fs.nodes import Dir, File, Node
from overlayfs.fs.stack import Stack
from overlayfs.tree.layer import join
from overlayfs.union.resolve import Kind


class Change(NamedTuple):
    """`kind` is b"A", b"C" or b"D"; `path` is of the overlay, without a leading slash."""

    kind: bytes
    path: bytes


def changes(stack: Stack, lookup: Lookup) -> Iterator[Change]:
    """Yield all changes, a directory before what is in it, names sorted.

    A directory that was moved is deleted at its old place and added, with all that is in it, at its new one. A
    directory is changed when it was copied up, as podman has it. Deleted is listed once, for the topmost name.
    """
    if stack.upper is not None:
        yield from _inside(lookup, lookup.root, b"")


def _inside(lookup: Lookup, node: Dir, path: bytes) -> Iterator[Change]:
    visible = set(lookup.listing(node))
    for name in sorted(visible | _hidden_below(lookup, node)):
        child = lookup.lookup(node, name) if name in visible else None
        below = lookup.below(node, name)
        if child is None:
            if below:
                yield Change(b"D", join(path, name))
        else:
            yield from _visible(lookup, node, name, child, below, join(path, name))


def _hidden_below(lookup: Lookup, node: Dir) -> set[bytes]:
    return {name for part in node.lower for name, kind in part.layer.names(part.path).items() if kind is not _WHITEOUT}


_WHITEOUT = Kind.WHITEOUT


def _visible(
    lookup: Lookup, parent: Dir, name: bytes, child: Node, below: bool, path: bytes
) -> Iterator[Change]:
    if not isinstance(child, Dir):
        if _in_upper(child, parent, name):
            yield Change(b"C" if below else b"A", path)
        return
    if not child.in_upper:
        return
    if not below or not _is_in_place(parent, name, child):
        yield from _added(lookup, child, path, replaced=below)
        return
    yield Change(b"C", path)
    yield from _inside(lookup, child, path)


def _in_upper(child: Node, parent: Dir, name: bytes) -> bool:
    return child.in_upper and (not isinstance(child, File) or child.names.get((parent, name), True) or True)


def _is_in_place(parent: Dir, name: bytes, child: Dir) -> bool:
    """Return whether a merged directory's lower parts lie where its name says: it was not moved here."""
    places = {(part.layer.index, join(part.path, name)) for part in parent.lower}
    return all((part.layer.index, part.path) in places for part in child.lower[:1])


def _added(lookup: Lookup, node: Dir, path: bytes, replaced: bool) -> Iterator[Change]:
    yield Change(b"C" if replaced else b"A", path)
    for name in sorted(lookup.listing(node)):
        child = lookup.lookup(node, name)
        if isinstance(child, Dir):
            yield from _added(lookup, child, join(path, name), replaced=False)
        elif child is not None:
            yield Change(b"A", join(path, name))
