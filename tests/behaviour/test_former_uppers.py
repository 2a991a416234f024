"""Uppers that became layers as they are, without a commit: the kernel's users do so."""

from pathlib import Path

from overlayfs import Overlay
from overlayfs.fs.config import StackConfig
from tests.support.requirements import need_root

NAMES = (b"f", b"g")


def _config(lower: list[Path], upper: Path, work: Path) -> StackConfig:
    for path in (upper, work):
        path.mkdir()
    paths = tuple(str(layer).encode() for layer in lower)
    return StackConfig(paths, str(upper).encode(), str(work).encode(), metacopy=False)


def _numbers(overlay: Overlay, turn: int) -> set[int]:
    return {overlay.attributes(overlay.lookup(overlay.root, b"%s%d" % (name, turn))).ino for name in NAMES}


def _rename_in(config: StackConfig, turn: int) -> set[int]:
    """Rename both names of the file, which copies it up; return every number that they had, after a remount too."""
    overlay = Overlay(config)
    seen = _numbers(overlay, turn)
    for name in NAMES:
        overlay.rename(overlay.root, b"%s%d" % (name, turn), overlay.root, b"%s%d" % (name, turn + 1))
    seen |= _numbers(overlay, turn + 1)
    overlay.close()
    overlay = Overlay(config)
    seen |= _numbers(overlay, turn + 1)
    overlay.close()
    return seen


def test_numbers_of_twins_stay_through_many_uppers(tmp_path: Path) -> None:
    need_root()
    stack = [tmp_path / "layer"]
    stack[0].mkdir()
    (stack[0] / "f0").write_bytes(b"data")
    (stack[0] / "g0").hardlink_to(stack[0] / "f0")
    seen = set()
    for turn in range(4):
        upper = tmp_path / f"upper{turn}"
        seen |= _rename_in(_config(stack, upper, tmp_path / f"work{turn}"), turn)
        stack.insert(0, upper)
    assert seen == {(tmp_path / "layer" / "f0").stat().st_ino}
