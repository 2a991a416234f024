"""Every refusal of `overlayfs` that needs no mount: its exact sentence and its exit code, and no traceback ever."""

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from overlayfs.errors import MountError, UserError
from overlayfs.fs.overlay import Overlay
from overlayfs.mount import control_client, daemon, mounts, options, start
from overlayfs_cli.main import COMMANDS
from tests.cli.conftest import Run, program

WRONG_USAGE = [
    (("frob",), "no such command 'frob'; see 'overlayfs --help'"),
    (("--frob",), "no such option '--frob'; see 'overlayfs --help'"),
    (("mount",), "missing argument '[IMAGE] MNT'; see 'overlayfs mount --help'"),
    (("mount", "--frob", "/m"), "no such option '--frob'; see 'overlayfs mount --help'"),
    (
        ("mount", "-o", "lowerdir=/a", "/m", "/n"),
        "an image brings its own layers, upper and work directory; leave yours out",
    ),
    (("mount", "--lower"), "option '--lower' requires an argument; see 'overlayfs --help'"),
    (("mount", ""), "an empty path is given"),
    (("mount", "--lower", "", "/m"), "an empty path is given"),
    (("mount", "/m"), "no layer is given; name at least one with lowerdir=DIR or --lower DIR"),
    (("mount", "--upper", "/u", "/m"), "no layer is given; name at least one with lowerdir=DIR or --lower DIR"),
    (
        ("mount", "--lower", "/a", "--work", "/w", "/m"),
        "workdir /w has no upperdir; add upperdir=DIR or leave workdir out",
    ),
    (
        ("mount", "-o", "lowerdir=/a,frob=1", "/m"),
        "unknown option frob in -o; see 'overlayfs mount --help'",
    ),
    (
        ("mount", "-o", "lowerdir=/a,frob=1,private", "/m"),
        "unknown options frob, private in -o; see 'overlayfs mount --help'",
    ),
    (
        ("mount", "-o", "lowerdir=/a", "--lower", "/b", "/m"),
        "both --lower and -o lowerdir are given; use one of them",
    ),
    (
        ("mount", "-o", "lowerdir=/a,upperdir=/u", "--upper", "/u", "/m"),
        "both --upper and -o upperdir are given; use one of them",
    ),
    (
        ("mount", "-o", "lowerdir=/a,upperdir=/u,workdir=/w", "--work", "/w", "/m"),
        "both --work and -o workdir are given; use one of them",
    ),
    (("mount", "-o", "lowerdir=/a,timeout=x", "/m"), "option timeout=x is not a number of seconds"),
    (("umount",), "missing argument 'MNT...'; see 'overlayfs umount --help'"),
    (("mounts", "/m"), "got unexpected extra argument (/m); see 'overlayfs mounts --help'"),
    (
        ("commit", "/m", "--to", "/d", "-t", "site"),
        "-t, -m, --author, --allow-empty, --wait and --store mean a store; leave them out with --to",
    ),
    (
        ("commit", "--to", "/d"),
        "give either a mount point or --upper with its --lower; see 'overlayfs commit --help'",
    ),
    (
        ("commit", "/m", "--upper", "/u", "--to", "/d"),
        "give either a mount point or --upper with its --lower; see 'overlayfs commit --help'",
    ),
    (
        ("commit", "--upper", "/u", "--to", "/d"),
        "--upper needs its lower layers; name them with --lower, top first",
    ),
    (
        ("commit", "/m", "--lower", "/a", "--to", "/d"),
        "--lower and --work describe an unmounted upper; leave them out with a mount point",
    ),
    (("diff",), "missing argument 'MNT|WORKSPACE|IMAGE'; see 'overlayfs diff --help'"),
    (("why", "/m"), "missing argument 'PATH'; see 'overlayfs why --help'"),
    (("stats",), "missing argument 'MNT'; see 'overlayfs stats --help'"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG_USAGE, ids=[" ".join(words) for words, _ in WRONG_USAGE])
def test_wrong_usage_is_2(overlayfs: Run, words: tuple[str, ...], sentence: str) -> None:
    assert overlayfs(*words) == (2, "", f"overlayfs: {sentence}\n")


NOT_MOUNTED = "{} is not a mount of overlayfs; see `overlayfs mounts`"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("umount", "{}"), 32),
        (("diff", "{}"), 1),
        (("why", "{}", "a"), 1),
        (("stats", "{}"), 1),
        (("commit", "{}", "--to", "/nowhere/new"), 1),
        (("commit", "{}", "-t", "site"), 1),
    ],
)
def test_a_directory_that_is_no_mount(overlayfs: Run, tmp_path: Path, words: tuple[str, ...], code: int) -> None:
    ended = overlayfs(*(word.format(tmp_path) for word in words))
    assert ended == (code, "", f"overlayfs: {NOT_MOUNTED.format(tmp_path)}\n")


def test_umount_goes_on_after_a_failure(overlayfs: Run, tmp_path: Path) -> None:
    ended = overlayfs("umount", f"{tmp_path}/a", f"{tmp_path}/b")
    assert ended.code == 32
    assert ended.err.splitlines() == [f"overlayfs: {NOT_MOUNTED.format(f'{tmp_path}/{name}')}" for name in "ab"]


def test_no_command_shows_the_help(overlayfs: Run) -> None:
    ended = overlayfs()
    assert ended.code == 2 and ended.out == "" and all(name in ended.err for name in COMMANDS)


def test_a_work_directory_that_cannot_be_created(overlayfs: Run, tmp_path: Path) -> None:
    upper = tmp_path / ("u" * 253)
    upper.mkdir()
    ended = overlayfs("mount", "--lower", "/a", "--upper", str(upper), "/m")
    where = f"{upper}.work: File name too long"
    sentence = f"cannot create a work directory beside the upper: {where}; name one with --work"
    assert ended == (32, "", f"overlayfs: {sentence}\n")


def _raising(error: BaseException) -> object:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def test_a_failed_mount_leaves_no_work_directory(
    overlayfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "mount", _raising(MountError("layer /a does not exist")))
    upper = tmp_path / "up"
    upper.mkdir()
    ended = overlayfs("mount", "--lower", "/a", "--upper", str(upper), "/m")
    assert ended == (32, "", "overlayfs: layer /a does not exist\n")
    assert list(tmp_path.iterdir()) == [upper]


def test_a_failed_mount_leaves_a_work_directory_that_was_there(
    overlayfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "mount", _raising(MountError("no")))
    (tmp_path / "up").mkdir()
    (tmp_path / "up.work").mkdir()
    overlayfs("mount", "--lower", "/a", "--upper", str(tmp_path / "up"), "/m")
    assert (tmp_path / "up.work").is_dir()


def test_the_error_of_the_daemon_is_passed_on(overlayfs: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_client.Client, "at", _raising(UserError("no daemon of this user answers for /m")))
    assert overlayfs("stats", "/m") == (1, "", "overlayfs: no daemon of this user answers for /m\n")


def test_an_error_of_the_system_is_a_sentence(overlayfs: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "list_mounts", _raising(OSError(13, "Permission denied", b"/proc/self/mountinfo")))
    assert overlayfs("mounts") == (1, "", "overlayfs: /proc/self/mountinfo: Permission denied\n")


def test_a_sentence_is_one_line_whatever_names_are_in_it(overlayfs: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"a\nb\x1b[31m\xff") + "\u202e"
    monkeypatch.setattr(mounts, "list_mounts", _raising(OSError(5, "Input/output error", name)))
    shown = "a\\nb\\x1b[31m\\udcff\\u202e"
    assert overlayfs("mounts") == (1, "", f"overlayfs: {shown}: Input/output error\n")


def test_a_defect_is_a_sentence_too(overlayfs: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "list_mounts", _raising(KeyError("x")))
    sentence = "unexpected KeyError: 'x' (a defect; OVERLAYFS_DEBUG=1 shows where)"
    assert overlayfs("mounts") == (1, "", f"overlayfs: {sentence}\n")
    monkeypatch.setenv("OVERLAYFS_DEBUG", "1")
    with pytest.raises(KeyError):
        overlayfs("mounts")


def test_an_interrupt_ends_the_line_and_is_130(overlayfs: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "list_mounts", _raising(KeyboardInterrupt()))
    assert overlayfs("mounts") == (130, "", "\n")


def test_a_closed_pipe_gets_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([program("overlayfs"), "mounts", "--json"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_engine_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "overlayfs.fuse.pyfuse3.engine", raising=False)
    monkeypatch.setitem(sys.modules, "pyfuse3", None)
    draft = options.Draft()
    draft.read(os.fsencode(f"lowerdir={tmp_path},engine=pyfuse3"))
    asked = draft.build()
    missing = r"^the engine pyfuse3 needs pyfuse3: pip install 'overlayfs\[pyfuse3\]'$"
    with closing(Overlay(asked.stack)) as overlay, pytest.raises(MountError, match=missing):
        daemon.build_engine(asked, overlay)
