"""`overlayfs-mount` up to the point where it mounts: its arguments, its silence, the cost of its start."""

import os
import subprocess
import sys

import pytest

from overlayfs import __version__
from overlayfs.errors import MountError
from overlayfs.mount import start
from overlayfs.mount.options import MountOptions
from overlayfs_cli import mount_helper
from tests.cli.conftest import Run

STACK = "lowerdir=/a:/b,upperdir=/u,workdir=/w"


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[MountOptions, bytes]]:
    """The mounts that the program would make, instead of making them."""
    wanted: list[tuple[MountOptions, bytes]] = []
    monkeypatch.setattr(start, "mount", lambda options, mountpoint: wanted.append((options, mountpoint)))
    return wanted


Asked = list[tuple[MountOptions, bytes]]


def test_a_container_engine_calls(overlayfs_mount: Run, mounted: Asked) -> None:
    assert overlayfs_mount("-o", STACK + ",,volatile", "/mnt") == (0, "", "")
    ((options, mountpoint),) = mounted
    assert mountpoint == b"/mnt"
    assert options.stack.lower == (b"/a", b"/b") and options.stack.volatile
    root = os.geteuid() == 0
    assert (options.allow_other, options.suid, options.dev) == (root, root, root)
    assert options.source == b"overlayfs" and not options.foreground


def test_mount_fuse3_calls(overlayfs_mount: Run, mounted: Asked) -> None:
    assert overlayfs_mount("none", "/mnt", "-o", f"rw,{STACK},dev,suid") == (0, "", "")
    ((options, mountpoint),) = mounted
    assert (options.source, mountpoint) == (b"none", b"/mnt")
    assert options.suid and options.dev


def test_mount_calls_a_helper_by_its_link(overlayfs_mount: Run, mounted: Asked) -> None:
    words = ("none", "/mnt", "-sn", "-v", "-t", "fuse.overlayfs-mount", "-o", f"rw,{STACK},nofail,nosuid")
    assert overlayfs_mount(*words, called="/sbin/mount.fuse.overlayfs-mount") == (0, "", "")
    ((options, _),) = mounted
    assert not options.suid and not options.foreground


def test_fake_mounts_nothing(overlayfs_mount: Run, mounted: Asked) -> None:
    words = ("none", "/mnt", "-f", "-o", STACK)
    assert overlayfs_mount(*words, called="/sbin/mount.fuse.overlayfs-mount") == (0, "", "")
    assert mounted == []


@pytest.mark.parametrize(("flag", "debug"), [("-f", False), ("--foreground", False), ("-d", True), ("--debug", True)])
def test_staying_in_the_foreground(overlayfs_mount: Run, mounted: Asked, flag: str, debug: bool) -> None:
    assert overlayfs_mount(flag, "-o", STACK, "/mnt").code == 0
    ((options, _),) = mounted
    assert options.foreground and options.debug == debug


@pytest.mark.parametrize(
    "words",
    [
        ("-o", "lowerdir=/a:/b", "-o", "upperdir=/u,workdir=/w", "/mnt"),
        ("-olowerdir=/a:/b", "/mnt", "-so", "upperdir=/u,workdir=/w"),
        ("-o", STACK, "--", "/mnt"),
    ],
)
def test_ways_to_write_the_same(overlayfs_mount: Run, mounted: Asked, words: tuple[str, ...]) -> None:
    assert overlayfs_mount(*words) == (0, "", "")
    ((options, mountpoint),) = mounted
    assert (options.stack.upper, options.stack.work, mountpoint) == (b"/u", b"/w", b"/mnt")


def test_the_source_is_the_name_given_by_option_first(overlayfs_mount: Run, mounted: Asked) -> None:
    assert overlayfs_mount("none", "/mnt", "-o", STACK + ",fsname=tree").code == 0
    assert mounted[0][0].source == b"tree"


def test_unknown_options_are_one_line_and_no_failure(overlayfs_mount: Run, mounted: Asked) -> None:
    ended = overlayfs_mount("-o", STACK + ",private,frob=1", "/mnt")
    assert ended == (0, "", "overlayfs-mount: unknown options ignored: private, frob\n")
    assert len(mounted) == 1


def test_a_work_directory_without_an_upper_is_ignored(overlayfs_mount: Run, mounted: Asked) -> None:
    ended = overlayfs_mount("-o", "lowerdir=/a,workdir=/w", "/mnt")
    assert ended == (0, "", "overlayfs-mount: workdir is ignored, since there is no upperdir\n")
    assert mounted[0][0].stack.work is None


def test_options_without_effect_are_not_reported(overlayfs_mount: Run, mounted: Asked) -> None:
    assert overlayfs_mount("-o", STACK + ",threaded=1,fast_ino=1,kernel_cache", "/mnt") == (0, "", "")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "one mount point is needed, 0 are given; see overlayfs-mount --help"),
        (("-o", STACK, "/a", "/b", "/c"), "one mount point is needed, 3 are given; see overlayfs-mount --help"),
        (("/mnt",), "no layer is given; name at least one with lowerdir=DIR or --lower DIR"),
        (("/mnt", "-o"), "flag -o needs a value; see overlayfs-mount --help"),
        (("-x", "/mnt"), "unknown flag -x; see overlayfs-mount --help"),
        (("--lower", "/mnt"), "unknown flag --lower; see overlayfs-mount --help"),
        (
            ("-o", "lowerdir=/a,upperdir=/u", "/mnt"),
            "upperdir /u has no workdir; add workdir=DIR, an empty directory on the same file system",
        ),
        (
            ("-o", STACK + ",remount,ro", "/mnt"),
            "a mount cannot be changed by remount; unmount it and mount it with the new options",
        ),
    ],
)
def test_wrong_usage_is_1(overlayfs_mount: Run, words: tuple[str, ...], sentence: str) -> None:
    assert overlayfs_mount(*words) == (1, "", f"overlayfs-mount: {sentence}\n")


def _raising(error: Exception) -> object:
    def mount(options: MountOptions, mountpoint: bytes) -> None:
        raise error

    return mount


def test_no_mount_is_32(overlayfs_mount: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "mount", _raising(MountError("upper /u is in use by the mount at /m (pid 1)")))
    ended = overlayfs_mount("-o", STACK, "/mnt")
    assert ended == (32, "", "overlayfs-mount: upper /u is in use by the mount at /m (pid 1)\n")


def test_anything_else_is_2_and_one_line(overlayfs_mount: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "mount", _raising(OSError(12, "Cannot allocate memory")))
    assert overlayfs_mount("-o", STACK, "/mnt") == (
        2,
        "",
        "overlayfs-mount: OSError: [Errno 12] Cannot allocate memory\n",
    )


def test_version_and_help(overlayfs_mount: Run) -> None:
    assert overlayfs_mount("--version") == overlayfs_mount("-V") == (0, f"overlayfs-mount {__version__}\n", "")
    shown = overlayfs_mount("-h")
    assert shown == overlayfs_mount("--help") and shown.code == 0 and "Example: overlayfs-mount -o" in shown.out


def test_a_closed_standard_error_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    mount_helper.complain("not shown anywhere")


def test_another_namespace_is_entered_by_nsenter(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[bytes]] = []
    monkeypatch.setattr(os, "execvp", lambda name, words: called.append(words))
    monkeypatch.setattr(mount_helper, "mount_options", lambda given: sys.exit(0))
    words = [b"none", b"/mnt", b"-N", b"/proc/1/ns/mnt", b"-o", b"lowerdir=/a"]
    with pytest.raises(SystemExit):
        mount_helper.run("/sbin/mount.fuse.overlayfs-mount", words)
    rest = [b"/sbin/mount.fuse.overlayfs-mount", b"none", b"/mnt", b"-o", b"lowerdir=/a"]
    assert called == [[b"nsenter", b"--mount=/proc/1/ns/mnt", b"--", *rest]]


def test_nothing_is_imported_that_mounting_does_not_need() -> None:
    code = (
        "import sys, overlayfs_cli.mount_helper, overlayfs.mount.start;"
        "print(*sorted({'click', 'rich', 'trio', 'pyfuse3', 'hypothesis', 'asyncio', 'email', 'http', 'logging.config'}"
        " & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout == "\n"
