"""Why a path shows what it shows: what each layer holds there."""

import errno
import os
from typing import NamedTuple

from overlayfs.errors import oserror
from overlayfs.fs.core import Core
from overlayfs.fs.nodes import Dir, File, LowerDir, Node
from overlayfs.fs.stack import Stack
from overlayfs.union.resolve import Kind


class Holder(NamedTuple):
    """What one layer holds at a path.

    layer: the directory that the user named. kind: "file", "directory", "opaque directory" or "whiteout".
    role: "shown" (the overlay shows this one), "merged" (a directory that is merged into it), "data" (has the data of a
    metadata-only copy) or "hidden".
    """

    layer: bytes
    kind: str
    role: str


def explain(core: Core, path: bytes) -> list[Holder]:
    """Return what the layers hold at a path, top first; ENOENT where the directory that holds it is not there."""
    *leading, name = [part for part in path.split(b"/") if part] or [b""]
    parent: Node = core.lookup.root
    for component in leading:
        parent = _required(core, parent, component)
    if not name:
        return [Holder(_layer_path(core.stack, part), "directory", "merged") for part in _parts(core, parent)]
    if not isinstance(parent, Dir):
        raise oserror(errno.ENOTDIR, path)
    return _holders(core, parent, name)


def _required(core: Core, parent: Node, name: bytes) -> Node:
    node = core.lookup.lookup(parent, name) if isinstance(parent, Dir) else None
    if node is None:
        raise oserror(errno.ENOENT, name)
    return node


def _parts(core: Core, node: Node) -> list[LowerDir]:
    assert isinstance(node, Dir)
    stack = core.stack
    upper = [LowerDir(stack.upper, core.nodes.path(node))] if stack.upper is not None and node.in_upper else []
    return [*upper, *node.lower]


def _layer_path(stack: Stack, part: LowerDir) -> bytes:
    if part.layer is stack.upper:
        return os.path.abspath(stack.config.upper or b"")
    return os.path.abspath(stack.config.lower[part.layer.index - (stack.upper is not None)])


def _holders(core: Core, parent: Dir, name: bytes) -> list[Holder]:
    node = core.lookup.lookup(parent, name)
    found: list[Holder] = []
    for part in _parts(core, parent):
        entry = part.layer.probe(part.path, name)
        if entry.kind is not Kind.ABSENT:
            found.append(Holder(_layer_path(core.stack, part), entry.kind.value, _role(part, name, node, bool(found))))
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
