"""What parsers accept, on a real disk: unpacked archives, stacks with arbitrary marks, invalid requests.

Each function is run by `tests.support.fork_server`; `place` is a directory on its own small file system.
"""

import io
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from overlayfs import Overlay, StackConfig
from overlayfs.errors import UserError
from overlayfs.fs import Caller, Changes, Node
from overlayfs.fuse.kernel.passthrough import Io
from overlayfs.oci.layer_tar import unpack_tar
from overlayfs.tree.workdir import remove_tree
from tests.hostile import mutate, parsers
from tests.hostile.parsers import Found, Parser
from tests.oci import archives
from tests.support.builder import build, fingerprint
from tests.unit.fuse_fuzz import campaign

_SUFFIXES = ("opaque", "redirect", "metacopy", "origin", "nlink", "impure", "whiteout", "uuid")
_ATTRIBUTES = (
    *(f"{kind}.overlay.{suffix}" for kind in ("trusted", "user") for suffix in _SUFFIXES),
    *("user.fuseoverlayfs.opaque", "user.containers.override_stat", "security.fuseoverlayfs.override_stat"),
)
ROOT = Caller(0, 0)
_VALUES = tuple(value for _, values in parsers.MARKS.values() for value in values)
_OBJECTS = ("", "d", "d/f", "e", "f", "d/s", "d/s/x")


def unpack(place: str, seed: int, count: int) -> Found:
    """Unpack changed archives beside a tree that must not change."""
    top = Path(place)
    build(top, {"canary": {"etc": {"shadow": b"secret"}}})
    before = fingerprint(top / "canary")
    fd = os.open(top, os.O_RDONLY)

    def parse(archive: bytes) -> None:
        (top / "layer").mkdir()
        root = os.open(top / "layer", os.O_RDONLY)
        try:
            unpack_tar(io.BytesIO(archive).read, root)
        finally:
            os.close(root)
            remove_tree(fd, b"layer")
            assert fingerprint(top / "canary") == before and os.listdir(top) == ["canary"]

    outward = archives.symlink(b"s", os.fsencode(top / "canary"))
    blocks = (*parsers.BLOCKS, outward, archives.file(b"s/etc/shadow", b"overwritten"))
    return parsers.run(Parser(lambda random: mutate.tar(random, blocks), parse, (UserError,)), "unpack", seed, count)


def stacks(place: str, seed: int, count: int) -> Found:
    """Read everything in stacks of three layers, with marks of any value on any object, and change some of it."""
    top = Path(place)
    layers = [top / name for name in ("top", "middle", "low")]
    for layer in layers:
        layer.mkdir()
        build(layer, {"d": {"f": b"f", "s": {"x": b"x"}}, "e": {}, "f": b"f"})
    return parsers.run(Parser(partial(_marked, layers), partial(_look, top, layers), (OSError,)), "stacks", seed, count)


def _marked(layers: list[Path], random: Random) -> dict[str, bytes]:
    """Replace all marks by others, and return those."""
    for layer in layers:
        for path in (layer / name for name in _OBJECTS):
            for attribute in os.listxattr(path):
                os.removexattr(path, attribute)
    made = {}
    for _ in range(random.randint(1, 6)):
        path = random.choice(layers) / random.choice(_OBJECTS)
        name = random.choice(_ATTRIBUTES)
        value = random.choice(_VALUES)
        value = mutate.spoil(random, value, _VALUES) if random.random() < 0.5 else value
        os.setxattr(path, name, value[:2000])
        made[f"{path}:{name}"] = value
    return made


def _look(top: Path, layers: list[Path], _: dict[str, bytes]) -> None:
    lower, upper, work = tuple(map(os.fsencode, layers)), os.fsencode(top / "upper"), os.fsencode(top / "work")
    os.mkdir(upper)
    os.mkdir(work)
    fd = os.open(top, os.O_RDONLY)
    try:
        overlay = Overlay(StackConfig(lower, upper, work))
        try:
            errors = _walk(overlay)
        finally:
            overlay.close()
    finally:
        for name in (b"upper", b"work"):
            remove_tree(fd, name)
        os.close(fd)
    if errors:
        raise errors[0]


def _walk(overlay: Overlay) -> list[OSError]:
    """Call everything on every object; return the errors."""
    errors: list[OSError] = []
    pending: list[Node] = [overlay.root]
    list(overlay.changes())
    for _ in range(40):  # a redirect to a directory above makes a tree that never ends
        if not pending:
            break
        node = pending.pop()
        for act in _acts(overlay, node, pending):
            try:
                act()
            except OSError as error:
                errors.append(error)
    return errors


def _acts(overlay: Overlay, node: Node, pending: list[Node]) -> tuple[Callable[[], object], ...]:
    def enter() -> None:
        pending.extend(child.node for child in overlay.dir_offsets.read(node, 0) if child.node is not None)

    def rewrite() -> None:
        handle = overlay.files.open(node, os.O_RDWR)
        try:
            overlay.files.read(handle, 0, 100)
            overlay.files.write(handle, 0, b"changed")
        finally:
            overlay.files.release(handle)

    return (
        partial(overlay.attributes, node),
        partial(overlay.metadata.listxattr, node),
        enter if stat.S_ISDIR(node.kind) else rewrite,
        partial(overlay.set_attributes, node, Changes(mode=0o700)),
    )


def requests(place: str, seed: int, count: int) -> Found:
    """Send the kernel engine requests that no kernel sends."""
    found = campaign(Path(place), count, seed, *((Io.PASSTHROUGH, None), (Io.CACHED, None), (Io.AUTO, 0.0))[seed % 3])
    return Found(found.answers, found.wrong)
