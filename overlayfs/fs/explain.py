"""Why a path shows what it shows: what each layer holds there."""

import errno
import os
from typing import NamedTuple

from overlayfs.errors import oserror
from overlayfs.fs.lookup import Lookup
from overlayfs.fs.nodes import Dir, File, LowerDir, Node
from overlayfs.fs.stack import Stack
from overlayfs.union.resolve import Kind


class Holder(NamedTuple):
    """One layer's part in a path.

    layer: the directory that the user named. kind: "file", "directory", "opaque directory" or "whiteout".
    role: "shown" (this is what one sees), "merged" (a directory that takes part), "data" (holds the data of a
    metadata-only copy) or "hidden".
    """

    layer: bytes
    kind: str
    role: str


def explain(stack: Stack, lookup: Lookup, path: bytes) -> list[Holder]:
    """Return what the layers hold at a path, top first; ENOENT where the directory that holds it is not there."""
    *leading, name = [part for part in path.split(b"/") if part] or [b""]
    parent: Node = lookup.root
    for component in leading:
        parent = _required(lookup, parent, component)
    if not name:
        return [Holder(_layer_path(stack, part), "directory", "merged") for part in _parts(stack, lookup, parent)]
    if not isinstance(parent, Dir):
        raise oserror(errno.ENOTDIR, path)
    return _holders(stack, lookup, parent, name)


def _required(lookup: Lookup, parent: Node, name: bytes) -> Node:
    node = lookup.lookup(parent, name) if isinstance(parent, Dir) else None
    if node is None:
        raise oserror(errno.ENOENT, name)
    return node


def _parts(stack: Stack, lookup: Lookup, node: Node) -> list[LowerDir]:
    assert isinstance(node, Dir)
    upper = [LowerDir(stack.upper, lookup.path(node))] if stack.upper is not None and node.in_upper else []
    return [*upper, *node.lower]


def _layer_path(stack: Stack, part: LowerDir) -> bytes:
    if part.layer is stack.upper:
        return os.path.abspath(stack.config.upper or b"")
    return os.path.abspath(stack.config.lower[part.layer.index - (stack.upper is not None)])


def _holders(stack: Stack, lookup: Lookup, parent: Dir, name: bytes) -> list[Holder]:
    node = lookup.lookup(parent, name)
    found: list[Holder] = []
    for part in _parts(stack, lookup, parent):
        entry = part.layer.probe(part.path, name)
        if entry.kind is not Kind.ABSENT:
            found.append(Holder(_layer_path(stack, part), entry.kind.value, _role(part, name, node, bool(found))))
    return found


def _role(part: LowerDir, name: bytes, node: Node | None, is_below: bool) -> str:
    if node is None:
        return "hidden" if is_below else "shown"
    if not is_below:
        return "shown"
    if isinstance(node, Dir):
        return "merged" if any(own.layer is part.layer for own in node.lower) else "hidden"
    data = node.data if isinstance(node, File) else None
    return "data" if data is not None and data.layer is part.layer and data.name == name else "hidden"
