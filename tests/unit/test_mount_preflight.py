"""Where a mount point may be located."""

import os
from pathlib import Path

import pytest

from overlayfs import sysio
from overlayfs.errors import MountError
from overlayfs.fs.config import StackConfig
from overlayfs.mount import preflight
from tests.support.requirements import need_root


def _stack(base: Path) -> StackConfig:
    for name in ("lower", "upper", "work"):
        (base / name / "deep" / "er").mkdir(parents=True)
    (base / "mnt").mkdir()
    encoded = {name: os.fsencode(base / name) for name in ("lower", "upper", "work")}
    return StackConfig((encoded["lower"],), encoded["upper"], encoded["work"])


@pytest.mark.parametrize("name", ["mnt", "lower", "upper", "work"])
def test_beside_a_layer_or_on_it_is_allowed(tmp_path: Path, name: str) -> None:
    preflight.check_mountpoint(os.fsencode(tmp_path / name), _stack(tmp_path))


@pytest.mark.parametrize("below", ["deep", "deep/er"])
def test_inside_a_layer_with_a_private_clone_is_allowed(tmp_path: Path, below: str) -> None:
    need_root()
    preflight.check_mountpoint(os.fsencode(tmp_path / "lower" / below), _stack(tmp_path))


@pytest.mark.parametrize("name", ["upper", "work"])
@pytest.mark.parametrize("below", ["deep", "deep/er"])
def test_inside_the_upper_or_work_directory_is_refused(tmp_path: Path, name: str, below: str) -> None:
    stack = _stack(tmp_path)
    with pytest.raises(MountError, match=r"is inside .*; choose a mount point outside") as caught:
        preflight.check_mountpoint(os.fsencode(tmp_path / name / below), stack)
    assert str(tmp_path / name) in str(caught.value)
    assert caught.value.exit_code == 32


def test_a_layer_is_found_by_another_path(tmp_path: Path) -> None:
    stack = _stack(tmp_path)
    (tmp_path / "link").symlink_to("upper")
    with pytest.raises(MountError, match="is inside"):
        preflight.check_mountpoint(os.fsencode(tmp_path / "link" / "deep"), stack)


def test_a_missing_layer_is_reported_later(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    preflight.check_mountpoint(os.fsencode(tmp_path / "mnt"), StackConfig((os.fsencode(tmp_path / "gone"),)))


def test_inside_a_layer_that_shows_mounts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the privilege for private clones: the daemon would see its own mount."""
    stack = _stack(tmp_path)
    monkeypatch.setattr(sysio, "clone_mount", lambda fd: None)
    with pytest.raises(MountError, match="is inside"):
        preflight.check_mountpoint(os.fsencode(tmp_path / "lower" / "deep"), stack)


def test_a_root_that_is_no_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a chroot(2): no entry of mountinfo contains the upper."""
    monkeypatch.setattr(preflight, "kernel_mounts", list)
    upper, work = preflight.written_directories(_stack(tmp_path))
    device = os.stat(tmp_path).st_dev
    assert upper.device == work.device == f"{os.major(device)}:{os.minor(device)}"
    assert (upper.place, work.place) == (str(tmp_path / "upper"), str(tmp_path / "work"))
