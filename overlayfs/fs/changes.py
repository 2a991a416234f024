"""What the upper changes, as lines that container users know: A added, C changed, D deleted."""

from collections.abc import Iterator
from typing import NamedTuple

from overlayfs.fs.lookup import Lookup
from overlayfs.fs.nodes import Dir, Node
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
        yield from _walk(lookup, lookup.root)


_WHITEOUT = Kind.WHITEOUT
_Todo = tuple[Dir, bytes, frozenset[bytes] | None]  # a directory still to look into, its path, and what it replaces
_NOTHING: frozenset[bytes] = frozenset()


def _walk(lookup: Lookup, root: Dir) -> Iterator[Change]:
    # Not recursive: a tree may be deeper than the interpreter's stack. Reversed, so that names come out sorted.
    pending: list[Change | _Todo] = [(root, b"", None)]
    while pending:
        item = pending.pop()
        if isinstance(item, Change):
            yield item
        else:
            node, path, replaced = item
            found = _inside(lookup, node, path) if replaced is None else _added(lookup, node, path, replaced)
            pending.extend(reversed(list(found)))


def _inside(lookup: Lookup, node: Dir, path: bytes) -> Iterator[Change | _Todo]:
    visible = set(lookup.listing(node))
    for name in sorted(visible | _lower_names(lookup, node)):
        child = lookup.lookup(node, name) if name in visible else None
        in_lower = lookup.is_in_lower(node, name)
        if child is None:
            if in_lower:
                yield Change(b"D", join(path, name))
        else:
            yield from _visible(lookup, node, name, child, in_lower, join(path, name))


def _lower_names(lookup: Lookup, node: Dir) -> set[bytes]:
    return {name for part in node.lower for name, kind in part.layer.names(part.path).items() if kind is not _WHITEOUT}


def _visible(
    lookup: Lookup, parent: Dir, name: bytes, child: Node, in_lower: bool, path: bytes
) -> Iterator[Change | _Todo]:
    if not child.in_upper:
        return
    yield Change(b"C" if in_lower else b"A", path)
    if isinstance(child, Dir):
        merged = child.lower and _is_in_place(parent, name, child)
        yield child, path, None if merged else frozenset(lookup.lower_names(parent, name))


def _is_in_place(parent: Dir, name: bytes, child: Dir) -> bool:
    """Return whether a merged directory has its lower directories under its own name: it was not moved here."""
    places = {(part.layer.index, join(part.path, name)) for part in parent.lower}
    return all((part.layer.index, part.path) in places for part in child.lower[:1])


def _added(lookup: Lookup, node: Dir, path: bytes, replaced: frozenset[bytes]) -> Iterator[Change | _Todo]:
    for name in sorted(replaced.union(lookup.listing(node))):
        child = lookup.lookup(node, name)
        if child is None:
            yield Change(b"D", join(path, name))
        else:
            yield Change(b"C" if name in replaced else b"A", join(path, name))
        if isinstance(child, Dir):
            yield child, join(path, name), _NOTHING
