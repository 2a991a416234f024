"""`overlayfs doctor`: its findings on this machine and on ones with less, and that its probes leave nothing behind."""

import fcntl
import json
import os
import re
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlayfs.errors import MountError
from overlayfs.fuse.kernel import engine
from overlayfs.mount import control_server, daemon, start
from overlayfs_cli import diagnosis, trial_mount
from overlayfs_cli.diagnosis import FAILED, OFF, OK, Finding
from overlayfs_cli.trial_mount import Trial
from tests.cli.conftest import Run, process
from tests.support import leftovers, requirements
from tests.support.users import ALICE, run_as

assert daemon and engine and control_server  # what a daemon needs, for a user who may not read our interpreter
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
DEVICE = "/dev/fuse"


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@contextmanager
def device_mode(mode: int) -> Iterator[None]:
    """/dev/fuse with other permissions; another worker of this run that changes them waits."""
    with open(DEVICE, "rb+", buffering=0) as device:
        fcntl.flock(device, fcntl.LOCK_EX)
        before = stat.S_IMODE(os.stat(DEVICE).st_mode)
        os.chmod(DEVICE, mode)
        try:
            yield
        finally:
            os.chmod(DEVICE, before)


@pytest.mark.mounted
@pytest.mark.root
def test_this_machine(place: Path) -> None:
    requirements.need_root()
    (place / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(place / "tmp"), "OVERLAYFS_STORE": str(place / "store")}
    program = str(Path(sys.executable).with_name("overlayfs"))

    def run(*words: str) -> str:
        done = subprocess.run(
            [program, "doctor", *words], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    document, shown = json.loads(run("--json")), run()
    assert document["can_mount"] is True
    states = {finding["name"]: finding["state"] for finding in document["findings"]}
    assert len(states) == len(document["findings"])
    assert {states[name] for name in ("kernel", "python", "libraries", DEVICE, "mount", "store", "user xattrs")} == {OK}
    for finding in document["findings"]:
        assert re.search(rf"^{finding['state']} +{finding['name']} +{re.escape(finding['fact'])}$", shown, re.MULTILINE)
        assert finding["advice"] in shown
        assert bool(finding["advice"]) == (finding["state"] != OK), finding
    assert list(place.rglob("*")) == [place / "tmp"]
    assert not leftovers.mounts_below(place)


@pytest.mark.mounted
@pytest.mark.root
def test_a_user(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements.need_root()
    requirements.need_program("fusermount3")
    os.chown(place, ALICE.uid, ALICE.gid)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    monkeypatch.setattr("tempfile.tempdir", str(place))

    def examined() -> list[Finding]:
        return diagnosis.examine(os.fsencode(place))

    examined()  # loads all modules first: the user may not read our interpreter
    with device_mode(0o666):
        found = by_name(run_as(ALICE, examined))
    assert found["mount"].state == OK, found["mount"]
    assert (found["passthrough"].state, found["passthrough"].fact) == (OFF, "needs root")
    assert found["trusted xattrs"].state == OFF and found["user xattrs"].state == OK
    with device_mode(0o600):
        found = by_name(run_as(ALICE, examined))
    assert found["mount"].state == FAILED
    assert found[DEVICE] == Finding(DEVICE, FAILED, "Permission denied", "run chmod 666 /dev/fuse as root")


def test_nothing_can_be_mounted(overlayfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MountError("cannot open /dev/fuse: No such device")

    monkeypatch.setattr(start, "mount", fail)
    monkeypatch.setattr(diagnosis, "FUSE_DEVICE", f"{tmp_path}/fuse")
    ended = overlayfs("doctor", "--store", str(tmp_path))
    assert ended.code == 1
    lines = [line.split(maxsplit=2) for line in ended.out.splitlines()]
    assert ["failed", "mount", "no stack could be mounted"] in lines
    assert ["->", "cannot", "open /dev/fuse: No such device"] in lines
    assert ["failed", "/dev/fuse", "No such file or directory"] in lines
    assert ["->", "run", "modprobe fuse; in a container, start it with --device /dev/fuse"] in lines
    document = json.loads(overlayfs("doctor", "--store", str(tmp_path), "--json").out)
    assert document["can_mount"] is False
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "try_mount", lambda: Trial("kernel"))
    found = by_name(diagnosis.examine(b"/proc/store"))
    assert found["store"].state == OFF and "--store or $OVERLAYFS_STORE" in found["store"].advice
    assert "reflinks" not in found


@pytest.mark.parametrize(
    ("trial", "version", "state", "fact"),
    [
        (Trial("kernel", passes_through=True), (6, 9), OK, "data of a new file bypassed the daemon"),
        (Trial("kernel"), (6, 9), OFF, "data of a new file went through the daemon"),
        (Trial("kernel", passes_through=True), (6, 8), OFF, "needs Linux 6.9"),
    ],
)
def test_passthrough(
    monkeypatch: pytest.MonkeyPatch, trial: Trial, version: tuple[int, int], state: str, fact: str
) -> None:
    monkeypatch.setattr(diagnosis, "kernel_version", lambda: version)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = diagnosis._passthrough(trial)
    assert (found.state, found.fact) == (state, fact)


GOOD_PROGRAM = f'mount_program = "{Path(sys.executable).with_name("overlayfs-mount")}"'


@pytest.mark.parametrize(
    ("content", "state", "fact"),
    [
        (None, OFF, "there is no storage.conf"),
        ("[storage", OFF, "its storage.conf cannot be read"),
        ('[storage]\ndriver = "vfs"', OFF, "the driver in its storage.conf is not overlay"),
        ('[storage]\ndriver = "overlay"', OFF, "mount_program is not set in its storage.conf"),
        (
            '[storage]\ndriver = "overlay"\n[storage.options.overlay]\nmount_program = "/usr/bin/fuse-overlayfs"',
            OFF,
            "mount_program in its storage.conf is another program",
        ),
        (
            '[storage]\ndriver = "overlay"\n[storage.options.overlay]\nmount_program = "/none/overlayfs-mount"',
            OFF,
            "mount_program in its storage.conf cannot be run",
        ),
        (
            f'[storage]\ndriver = "overlay"\n[storage.options.overlay]\n{GOOD_PROGRAM}',
            OK,
            "driver overlay, mount_program overlayfs-mount",
        ),
        (
            f'[storage]\ndriver = "overlay"\n[storage.options]\n{GOOD_PROGRAM}',
            OK,
            "driver overlay, mount_program overlayfs-mount",
        ),
    ],
)
def test_podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, state: str, fact: str) -> None:
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", f"{tmp_path}/storage.conf")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    if content is not None:
        (tmp_path / "storage.conf").write_text(content)
    found = diagnosis._podman()
    assert (found.state, found.fact) == (state, fact)


def test_subordinate_ids(tmp_path: Path) -> None:
    listed = tmp_path / "subuid"
    listed.write_text("alice:100000:65536\n1000:200000:10\nbob:1:1\n# alice:1:1\n")
    assert diagnosis._subordinate(str(listed), ("alice", "1000")) == 65546
    assert diagnosis._subordinate(f"{tmp_path}/none", ("alice", "1000")) == 0


def test_the_libraries_are_those_of_the_package() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["pyfuse3"]]
    assert list(diagnosis.LIBRARIES) == sorted(re.split(r"[<>=;]", each)[0] for each in needed)


def test_a_mount_that_shows_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content that the trial reads is compared: an unmounted directory is not a working mount."""
    monkeypatch.setattr(start, "mount", lambda *_: None)
    monkeypatch.setattr(trial_mount, "_unmount", lambda _: None)
    trial = trial_mount.try_mount()
    assert trial.error is not None and trial.error.startswith("a stack was mounted, but did not work: ")


def test_usage() -> None:
    assert process("overlayfs", "doctor", "x").code == 2
