"""Uppers that became layers as they are, without a commit: what the kernel's own users do."""

from pathlib import Path

from overlayfs import Overlay
from overlayfs.fs.attributes import Changes
from overlayfs.fs.config import StackConfig
from overlayfs.fs.names import Caller
from tests.support.requirements import need_root

ROOT = Caller(0, 0)


def _numbers_around_chmod(lower: list[Path], upper: Path, work: Path) -> set[int]:
    """Change the mode of both names' file in a new upper; return every number the names had, remounted too."""
    paths = tuple(str(layer).encode() for layer in lower)
    config = StackConfig(paths, str(upper).encode(), str(work).encode(), metacopy=False)
    seen = set()
    for _ in range(2):
        overlay = Overlay(config)
        for name in (b"f", b"g"):
            node = overlay.lookup(overlay.root, name)
            seen.add(overlay.attributes(node).ino)
            seen.add(overlay.set_attributes(node, Changes(mode=0o640), ROOT).ino)
        overlay.close()
    return seen


def test_numbers_of_twins_stay_through_four_uppers(tmp_path: Path) -> None:
    need_root()
    stack = [tmp_path / "layer"]
    stack[0].mkdir()
    (stack[0] / "f").write_bytes(b"data")
    (stack[0] / "g").hardlink_to(stack[0] / "f")
    seen = set()
    for turn in range(4):
        upper, work = tmp_path / f"upper{turn}", tmp_path / f"work{turn}"
        upper.mkdir()
        work.mkdir()
        seen |= _numbers_around_chmod(stack, upper, work)
        stack.insert(0, upper)
    assert seen == {(tmp_path / "layer" / "f").stat().st_ino}
