"""Uppers that became layers as they are, without a commit, as users of the kernel's overlayfs do."""

import os
from pathlib import Path

from overlayfs import Overlay
from overlayfs.fs.config import StackConfig
from overlayfs.fs.names import Caller
from tests.support.requirements import need_root

NAMES = (b"f", b"g")


def _config(lower: list[Path], upper: Path, work: Path, metacopy: bool = False) -> StackConfig:
    for path in (upper, work):
        path.mkdir()
    paths = tuple(str(layer).encode() for layer in lower)
    return StackConfig(paths, str(upper).encode(), str(work).encode(), metacopy=metacopy)


def _numbers(overlay: Overlay, turn: int) -> set[int]:
    return {overlay.attributes(overlay.lookup(overlay.root, b"%s%d" % (name, turn))).ino for name in NAMES}


def _rename_in(config: StackConfig, turn: int) -> set[int]:
    """Rename both names of the file, which copies it up; return every number that they had, after a remount too."""
    overlay = Overlay(config)
    seen = _numbers(overlay, turn)
    for name in NAMES:
        overlay.names.rename(overlay.root, b"%s%d" % (name, turn), overlay.root, b"%s%d" % (name, turn + 1))
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


def _make_lower(base: Path) -> Path:
    layer = base / "layer"
    (layer / "d" / "sub").mkdir(parents=True)
    (layer / "d" / "sub" / "f").write_bytes(b"f")
    (layer / "d" / "g").write_bytes(b"g")
    return layer


def _move(config: StackConfig, moves: dict[bytes, bytes]) -> None:
    overlay = Overlay(config)
    for old, new in moves.items():
        *above, name = old.split(b"/")
        overlay.names.rename(overlay.resolve(b"/".join(above)), name, overlay.root, new)
    overlay.close()


def _content(config: StackConfig, path: bytes) -> bytes:
    overlay = Overlay(config)
    try:
        handle = overlay.files.open(overlay.resolve(path), os.O_RDONLY)
        found = overlay.files.read(handle, 0, 10)
        overlay.files.release(handle)
        return found
    finally:
        overlay.close()


def test_what_is_below_a_redirect_of_a_former_upper_moves(tmp_path: Path) -> None:
    """A redirect names a path as the layers together show it, not the one in the layer that holds the object."""
    need_root()
    stack = [_make_lower(tmp_path)]
    _move(_config(stack, tmp_path / "upper0", tmp_path / "work0", metacopy=True), {b"d": b"e"})
    stack.insert(0, tmp_path / "upper0")
    config = _config(stack, tmp_path / "upper1", tmp_path / "work1", metacopy=True)
    _move(config, {b"e/sub": b"x", b"e/g": b"g"})
    assert (_content(config, b"g"), _content(config, b"x/f")) == (b"g", b"f")


def test_a_file_renamed_in_two_uppers_keeps_its_data(tmp_path: Path) -> None:
    need_root()
    stack = [_make_lower(tmp_path)]
    for turn, moves in enumerate(({b"d/g": b"new"}, {b"new": b"g"}, {b"g": b"new"})):
        config = _config(stack, tmp_path / f"upper{turn}", tmp_path / f"work{turn}", metacopy=True)
        _move(config, moves)
        assert _content(config, next(iter(moves.values()))) == b"g"
        stack.insert(0, tmp_path / f"upper{turn}")


def test_data_below_an_opaque_directory_of_a_former_upper(tmp_path: Path) -> None:
    """A directory was recreated and got a file back whose data is in a lower layer; then the file moves on."""
    need_root()
    stack = [_make_lower(tmp_path)]
    overlay = Overlay(_config(stack, tmp_path / "upper0", tmp_path / "work0", metacopy=True))
    root, directory = overlay.root, overlay.resolve(b"d")
    overlay.names.rename(directory, b"g", root, b"g")
    overlay.names.unlink(overlay.resolve(b"d/sub"), b"f")
    overlay.names.rmdir(directory, b"sub")
    overlay.names.rmdir(root, b"d")
    overlay.names.rename(root, b"g", overlay.names.mkdir(root, b"d", 0o755, Caller(0, 0))[0], b"g")
    overlay.close()
    stack.insert(0, tmp_path / "upper0")
    config = _config(stack, tmp_path / "upper1", tmp_path / "work1", metacopy=True)
    assert _content(config, b"d/g") == b"g"
    _move(config, {b"d/g": b"new"})
    assert _content(config, b"new") == b"g"
