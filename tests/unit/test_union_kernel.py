"""The kernel's overlayfs shows exactly what the rules say, for every stack of three layers."""

import os
import stat
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from overlayfs.format import opaque, xattrs
from overlayfs.union.merge import merge
from overlayfs.union.resolve import Kind, resolve
from tests.support.disks import disk

pytestmark = [pytest.mark.root, pytest.mark.kernel]

STACKS = {"-".join(kind.name for kind in kinds): kinds for kinds in product(Kind, repeat=3)}


def _make(path: Path, kind: Kind, layer: int) -> None:
    if kind is Kind.WHITEOUT:
        os.mknod(path, stat.S_IFCHR, 0)
    elif kind is Kind.FILE:
        path.write_text(str(layer))
    elif kind in (Kind.DIR, Kind.OPAQUE):
        path.mkdir()
        (path / str(layer)).touch()
    if kind is Kind.OPAQUE:
        os.setxattr(path, xattrs.prefix(xattrs.Mode.TRUSTED) + xattrs.OPAQUE, opaque.OPAQUE_VALUE)


@pytest.fixture
def mounted(place: Path) -> Iterator[Path]:
    with disk("tmpfs", place / "disk") as base:
        for layer in range(3):
            (base / str(layer)).mkdir()
            for name, kinds in STACKS.items():
                _make(base / str(layer) / name, kinds[layer], layer)
        point = place / "kernel"
        point.mkdir()
        options = "lowerdir=" + ":".join(str(base / str(layer)) for layer in range(3))
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(point)], check=True)
        try:
            yield point
        finally:
            subprocess.run(["umount", str(point)], check=True)


def _parts(path: Path) -> tuple[int, ...]:
    if path.is_dir():
        return tuple(sorted(int(name) for name in os.listdir(path)))
    return (int(path.read_text()),) if path.exists() else ()


def test_the_kernel_agrees(mounted: Path) -> None:
    assert {name: _parts(mounted / name) for name in STACKS} == {name: resolve(kinds) for name, kinds in STACKS.items()}
    layers = [{name.encode(): kinds[layer] for name, kinds in STACKS.items()} for layer in range(3)]
    assert sorted(os.listdir(os.fsencode(mounted))) == sorted(merge(layers))
