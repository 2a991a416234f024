"""Each kind of change, as a single verb where possible."""

import os

from overlayfs import Overlay, sysio
from overlayfs.fs import Changes, Node
from tests.crash.harness import ROOT, USER, Operation, write


def _at(overlay: Overlay, *names: bytes) -> Node:
    node: Node = overlay.root
    for name in names:
        node = overlay.lookup(node, name)
    return node


def _rename(*names: bytes, flags: int = 0) -> Operation:
    old, new = (tuple(path.split(b"/")) for path in names)

    def rename(overlay: Overlay) -> None:
        overlay.names.rename(_at(overlay, *old[:-1]), old[-1], _at(overlay, *new[:-1]), new[-1], flags)

    return rename


def _clear_merged(overlay: Overlay) -> None:
    merged = _at(overlay, b"merged")
    for name in (b"deep", b"shallow"):
        overlay.names.unlink(merged, name)


def _copy_metadata(overlay: Overlay) -> None:
    overlay.set_attributes(_at(overlay, b"file"), Changes(mode=0o600))


PREPARATIONS: dict[str, Operation] = {
    "write to a metadata-only copy": _copy_metadata,
    "truncate a metadata-only copy": _copy_metadata,
    "rmdir of a merged directory": _clear_merged,
    "rename onto emptied": _clear_merged,
}
"""What happens without a fault before the operation of this name."""

OPERATIONS: dict[str, Operation] = {
    "write": lambda o: write(o, b"file", b"written"),
    "write to a metadata-only copy": lambda o: write(o, b"file", b"written"),
    "truncate a metadata-only copy": lambda o: write(o, b"file", b"", flags=os.O_WRONLY | os.O_TRUNC),
    "open for writing": lambda o: write(o, b"file", b""),
    "open a twin for writing": lambda o: write(o, b"one", b""),
    "open with truncation": lambda o: write(o, b"file", b"", flags=os.O_WRONLY | os.O_TRUNC),
    "truncate": lambda o: o.set_attributes(_at(o, b"file"), Changes(size=10)),
    "chmod": lambda o: o.set_attributes(_at(o, b"file"), Changes(mode=0o600)),
    "chmod deep": lambda o: o.set_attributes(_at(o, b"lower", b"inner", b"leaf"), Changes(mode=0o600)),
    "setxattr": lambda o: o.setxattr(_at(o, b"file"), b"user.new", b"1"),
    "link": lambda o: o.names.link(_at(o, b"file"), _at(o, b"made"), b"again"),
    "link over a whiteout": lambda o: o.names.link(_at(o, b"fresh"), o.root, b"hidden"),
    "create": lambda o: write(o, b"new", b"", create=True),
    "create over a whiteout": lambda o: write(o, b"hidden", b"", create=True),
    "mkdir": lambda o: o.names.mkdir(o.root, b"new", 0o750, USER),
    "mkdir over a whiteout": lambda o: o.names.mkdir(o.root, b"gone", 0o750, USER),
    "symlink in a lower directory": lambda o: o.names.symlink(_at(o, b"lower", b"inner"), b"new", b"to", ROOT),
    "unlink lower": lambda o: o.names.unlink(o.root, b"file"),
    "unlink upper": lambda o: o.names.unlink(o.root, b"fresh"),
    "unlink copied up": lambda o: o.names.unlink(o.root, b"link"),
    "unlink a twin": lambda o: o.names.unlink(o.root, b"two"),
    "rmdir lower": lambda o: o.names.rmdir(o.root, b"empty"),
    "rmdir upper": lambda o: o.names.rmdir(o.root, b"made"),
    "rmdir of a merged directory": lambda o: o.names.rmdir(o.root, b"merged"),
    "rename lower": _rename(b"file", b"moved"),
    "rename lower into a lower directory": _rename(b"file", b"lower/inner/moved"),
    "rename upper": _rename(b"fresh", b"moved"),
    "rename over a lower file": _rename(b"fresh", b"file"),
    "rename over a whiteout": _rename(b"file", b"hidden"),
    "rename a twin": _rename(b"two", b"moved"),
    "rename a merged directory": _rename(b"merged", b"moved"),
    "rename a directory over a whiteout": _rename(b"made", b"gone"),
    "rename onto empty": _rename(b"made", b"empty"),
    "rename onto emptied": _rename(b"made", b"merged"),
    "exchange files": _rename(b"file", b"fresh", flags=sysio.RENAME_EXCHANGE),
    "exchange directories": _rename(b"merged", b"made", flags=sysio.RENAME_EXCHANGE),
}

COPYING = ("write", "write to a metadata-only copy", "open for writing", "open a twin for writing", "truncate")
"""The operations that copy data."""
