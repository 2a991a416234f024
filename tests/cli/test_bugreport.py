"""`overlayfs bugreport`: its facts about a mount, and that no name and no content is in it."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs import __version__
from overlayfs_cli import bugreport
from tests.cli.conftest import Run, process, program
from tests.support import leftovers, processes, requirements, syscalls

SECRET = "telling"  # is part of every name and of every content
HOST = f"{SECRET}-host"


@pytest.fixture
def shop(place: Path) -> Iterator[Path]:
    """Directories and a file whose names and contents can be recognized in a report."""
    requirements.need_root()
    before = processes.children()
    shop = place / f"{SECRET} dir"
    for name in ("top", "base", "up", "mnt", "home", "home/run"):
        (shop / f"{SECRET}-{name}").mkdir(parents=True)
    (shop / f"{SECRET}-base/{SECRET}-file").write_text(f"{SECRET} content")
    yield shop
    for point in leftovers.mounts_below(place):
        syscalls.umount(os.fsencode(point), 2)
    processes.reap_since(before)


def path(shop: Path, name: str) -> str:
    return str(shop / f"{SECRET}-{name}")


@pytest.mark.mounted
@pytest.mark.root
@pytest.mark.parametrize("engine", ["kernel", "pyfuse3"])
def test_a_mount_that_has_names(shop: Path, engine: str) -> None:
    options = f"engine={engine},fsname={SECRET}-source,xino=off,timeout=5"
    layers = ("--lower", path(shop, "top"), "--lower", path(shop, "base"), "--upper", path(shop, "up"))
    assert process("overlayfs", "mount", "-q", *layers, "-o", options, path(shop, "mnt")).code == 0
    mount = Path(path(shop, "mnt"))
    (mount / f"{SECRET}-file").write_text(f"{SECRET} more")
    os.rename(mount / f"{SECRET}-file", mount / f"{SECRET}-other")
    os.setxattr(mount / f"{SECRET}-other", f"user.{SECRET}", SECRET.encode())
    assert process("overlayfs", "commit", "--to", path(shop, "no/such/dir"), path(shop, "mnt")).code != 0
    report = _reported(shop, path(shop, "mnt"))
    assert SECRET not in report
    assert str(shop.parent) not in report
    facts = _facts(report)
    assert facts["overlayfs"] == __version__
    assert facts["engine"].startswith(f"{engine}, up ")
    assert facts["FUSE protocol"] == "unknown" or re.fullmatch(r"7\.\d+", facts["FUSE protocol"])
    assert "timeout=5.0" in facts["options"] and "xino=False" in facts["options"]
    assert re.fullmatch(r"2: 2 on \w+", facts["layers"]) and re.fullmatch(r"on \w+", facts["upper"])
    counts = dict(word.split("=") for word in facts["requests"].split())
    assert int(counts["RENAME2" if "RENAME2" in counts else "RENAME"]) == 1
    assert facts["mount"].startswith("ok: ")  # of the doctor's findings
    process("overlayfs", "umount", path(shop, "mnt"))


@pytest.mark.mounted
@pytest.mark.root
def test_an_image_that_has_names(shop: Path) -> None:
    store = ("--store", path(shop, "store"))
    assert process("overlayfs", "import", path(shop, "base"), "-t", f"{SECRET}:{SECRET}", *store).code == 0
    named = (f"{SECRET}:{SECRET}", path(shop, "mnt"), "--name", f"{SECRET}-workspace")
    assert process("overlayfs", "mount", *named, *store).code == 0
    report = _reported(shop, path(shop, "mnt"))
    assert SECRET not in report
    assert _facts(report)["image"] == "yes"
    assert process("overlayfs", "umount", path(shop, "mnt")).code == 0


def _reported(shop: Path, point: str) -> str:
    """Return the report of a user on a host with recognizable names."""
    script = 'hostname "$1" && shift && exec "$@"'
    environment = {
        **os.environ, "USER": f"{SECRET}-user", "LOGNAME": f"{SECRET}-user", "HOME": path(shop, "home"),
        "OVERLAYFS_STORE": path(shop, "store"), "TMPDIR": path(shop, "home"),
    }  # fmt: skip
    done = subprocess.run(
        ["unshare", "--uts", "sh", "-c", script, "sh", HOST, program("overlayfs"), "bugreport", point],
        env=environment, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert all(len(line) <= bugreport.WIDTH and (not line or line.startswith(bugreport.INDENT)) for line in lines)
    return done.stdout


def _facts(report: str) -> dict[str, str]:
    """Return the facts by label; those with several lines, or several times the same label, are joined."""
    found: dict[str, str] = {}
    label = ""
    for line in report.splitlines():
        start, text = line[4:22].strip(), line[22:].strip()
        label = start or label
        found[label] = f"{found.get(label, '')} {text}".strip()
    return found


@pytest.mark.mounted
@pytest.mark.root
def test_messages_come_without_their_arguments(shop: Path) -> None:
    """The counters are logged with the name of the mount point, on SIGUSR1."""
    mounted = process("overlayfs", "mount", "-q", "--lower", path(shop, "base"), path(shop, "mnt"))
    assert mounted.code == 0
    pid = next(int(pid) for pid in processes.children() if _is_daemon(pid))
    os.kill(pid, 10)
    facts = _facts(_reported(shop, path(shop, "mnt")))
    assert facts["log"] == "0.0 s INFO overlayfs.mount.daemon: requests of %s: %s"
    process("overlayfs", "umount", path(shop, "mnt"))


def _is_daemon(pid: int) -> bool:
    return b"overlayfs" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_without_a_mount(overlayfs: Run, tmp_path: Path) -> None:
    ended = overlayfs("bugreport", "--store", str(tmp_path))
    assert (ended.code, ended.err) == (0, "")
    facts = _facts(ended.out)
    assert {"overlayfs", "distribution", "kernel", "python", "libraries", "mount", "podman"} <= facts.keys()
    assert "engine" not in facts and "->" not in ended.out


def test_a_mount_that_does_not_answer(overlayfs: Run, tmp_path: Path) -> None:
    ended = overlayfs("bugreport", "--store", str(tmp_path), str(tmp_path))
    assert ended.code == 1
    assert ended.err == f"overlayfs: {tmp_path} is not a mount of overlayfs; see `overlayfs mounts`\n"
    assert ended.out.endswith("the daemon of the mount does not answer\n")
    assert str(tmp_path) not in ended.out
