"""What the verbs that change names need lifted first: nodes of an overlay, ancestors left to the lifting."""

from collections.abc import Iterator

from overlayfs import sysio
from overlayfs.fs.copyup import Requirement
from overlayfs.fs.nodes import Node
from overlayfs.fs.overlay import Overlay

Requirements = Iterator[tuple[Node, Requirement]]


def of_unlink(overlay: Overlay, parent: Node, name: bytes) -> Requirements:
    """Yield what must be lifted before a name can be removed; ENOENT for none."""
    node = overlay.lookup(parent, name)
    yield parent, Requirement.METADATA
    if (requirement := overlay.requirement_of_unlink(node)) is not None:
        yield node, requirement


def of_rename(overlay: Overlay, old: Node, name: bytes, new: Node, new_name: bytes, flags: int) -> Requirements:
    """Yield what must be lifted before a name can be moved; ENOENT for none."""
    source = overlay.lookup(old, name)
    yield new, Requirement.METADATA
    yield from overlay.requirements_of_rename(source)
    yield from _of_target(overlay, new, new_name, flags)


def _of_target(overlay: Overlay, parent: Node, name: bytes, flags: int) -> Requirements:
    target = overlay.find(parent, name)
    if target is None:
        return
    if flags & sysio.RENAME_EXCHANGE:
        yield from overlay.requirements_of_rename(target)
    elif not flags and (requirement := overlay.requirement_of_unlink(target)) is not None:
        yield target, requirement
