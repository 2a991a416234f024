"""The main job as it is typed: mount, look, change, commit, unmount; with the real programs and a real mount."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ended, process, program
from tests.support import leftovers, processes, requirements


@pytest.fixture
def job(place: Path) -> Iterator[Path]:
    """A directory with the layers `a` over `b`, an upper `u` and a mount point `m`; what is mounted is unmounted."""
    requirements.need_root()
    requirements.need_program("fusermount3")
    before = processes.children()
    for name in ("a/etc", "b/etc", "b/share", "u", "m"):
        (place / name).mkdir(parents=True)
    (place / "a/etc/motd").write_text("of a\n")
    (place / "b/etc/motd").write_text("of b\n")
    (place / "b/etc/hosts").write_text("localhost\n")
    (place / "b/share/file").write_text("content\n")
    yield place
    for point in leftovers.mounts_below(place):
        subprocess.run(["umount", point], check=True)
    processes.reap_since(before)


def cli(job: Path, line: str) -> Ended:
    """Run a command line in the directory of the job."""
    name, *words = line.split()
    return process(name, *words, cwd=job)


def mount(job: Path) -> None:
    assert cli(job, "overlayfs mount --lower a --lower b --upper u m") == (0, "", "")


def change(job: Path) -> None:
    """One change of each kind."""
    (job / "m/etc/motd").write_text("changed\n")
    (job / "m/etc/hosts").unlink()
    (job / "m/new").write_text("new\n")


CHANGES = [("C", "/etc"), ("D", "/etc/hosts"), ("C", "/etc/motd"), ("A", "/new")]


def test_mount_with_options(job: Path) -> None:
    (job / "w").mkdir()
    assert cli(job, "overlayfs mount -o lowerdir=a:b,upperdir=u,workdir=w m") == (0, "", "")
    assert (job / "m/etc/motd").read_text() == "of a\n"
    assert (job / "m/share/file").read_text() == "content\n"


def test_mount_by_the_command_makes_the_work_directory(job: Path) -> None:
    mount(job)
    change(job)
    assert (job / "u/new").read_text() == "new\n"
    assert (job / "u.work").stat().st_mode & 0o777 == 0o700
    assert (job / "b/etc/hosts").exists()


def test_mount_without_upper_is_read_only(job: Path) -> None:
    assert cli(job, "overlayfs mount --lower a --lower b m") == (0, "", "")
    with pytest.raises(OSError, match="Read-only"):
        (job / "m/new").write_text("new")


def test_mount_without_privilege_of_the_mount_program(job: Path) -> None:
    assert cli(job, "overlayfs mount --lower a m").code == 0
    assert {"nosuid", "nodev"} <= _kernel_options(job / "m")


def test_the_mount_program_mounts_for_containers(job: Path) -> None:
    (job / "w").mkdir()
    assert cli(job, "overlayfs-mount -o lowerdir=a:b,upperdir=u,workdir=w,,volatile,nodev, m") == (0, "", "")
    options = _kernel_options(job / "m")
    assert "nodev" in options and "nosuid" not in options and "allow_other" in options
    change(job)


def _kernel_options(point: Path) -> set[str]:
    """The options of a mount and of its superblock."""
    done = subprocess.run(
        ["findmnt", "-n", "-o", "OPTIONS", str(point)], capture_output=True, text=True, check=True, timeout=10
    )
    return set(done.stdout.strip().split(","))


def test_mounts(job: Path) -> None:
    mount(job)
    found = _found(job)
    assert found["lower"] == [f"{job}/a", f"{job}/b"]
    assert (found["upper"], found["work"], found["source"]) == (f"{job}/u", f"{job}/u.work", "overlayfs")
    assert found["engine"] == "kernel" and not found["read_only"] and os.path.exists(f"/proc/{found['pid']}")
    (line,) = [line for line in cli(job, "overlayfs mounts").out.splitlines() if line.startswith(f"{job}/m ")]
    assert line.split() == [f"{job}/m", "kernel", str(found["pid"]), "-", "-", f"{job}/u", f"{job}/a:{job}/b"]
    assert f"{job}/m" in cli(job, "overlayfs mounts -q").out.splitlines()


def _found(job: Path) -> dict[str, Any]:
    """What `overlayfs mounts` reports about the mount of the job."""
    mounts = json.loads(cli(job, "overlayfs mounts --json").out)["mounts"]
    (found,) = [each for each in mounts if each["mountpoint"] == f"{job}/m"]
    assert isinstance(found, dict)
    return found


def test_diff(job: Path) -> None:
    mount(job)
    assert cli(job, "overlayfs diff m") == (0, "", "")
    change(job)
    assert cli(job, "overlayfs diff m") == (0, "".join(f"{kind} {path}\n" for kind, path in CHANGES), "")
    document = json.loads(cli(job, "overlayfs diff m --json").out)
    assert document == {"changes": [{"kind": kind, "path": path} for kind, path in CHANGES]}
    assert cli(job, "overlayfs diff m --stat").out == "1 added, 2 changed, 1 deleted; 12 B in, 15 B out\n"
    assert json.loads(cli(job, "overlayfs diff m --stat --json").out) == {
        "added": 1, "changed": 2, "deleted": 1, "bytes_in": 12, "bytes_out": 15
    }  # fmt: skip


def test_why(job: Path) -> None:
    mount(job)
    change(job)
    document = json.loads(cli(job, "overlayfs why m etc/motd --json").out)
    assert document["path"] == "/etc/motd"
    assert [(each["layer"], each["kind"], each["role"]) for each in document["layers"]] == [
        (f"{job}/u", "file", "shown"),
        (f"{job}/a", "file", "hidden"),
        (f"{job}/b", "file", "hidden"),
    ]
    shown = cli(job, "overlayfs why m m/etc/hosts").out.splitlines()
    assert [line.split() for line in shown] == [
        ["LAYER", "KIND", "ROLE"],
        [f"{job}/u", "whiteout", "shown"],
        [f"{job}/b", "file", "hidden"],
    ]


def test_why_nothing(job: Path) -> None:
    mount(job)
    assert cli(job, "overlayfs why m nowhere") == (1, "", "overlayfs: no layer of m holds /nowhere\n")


def test_stats(job: Path) -> None:
    mount(job)
    (job / "m/new").write_text("new\n")
    document = json.loads(cli(job, "overlayfs stats m --json").out)
    assert document["engine"] == "kernel" and document["requests"]["CREATE"] == 1
    assert cli(job, "overlayfs stats m").out.startswith("kernel, up ")


def test_stats_watch_ends_by_interrupt(job: Path) -> None:
    mount(job)
    watching = subprocess.Popen([program("overlayfs"), "stats", "m", "--watch"], cwd=job, stdout=subprocess.PIPE)
    assert watching.stdout is not None
    assert b" requests" in watching.stdout.readline()
    watching.send_signal(2)
    watching.communicate(timeout=20)
    assert watching.returncode == 130


def test_commit_while_mounted_then_mount_the_layer(job: Path) -> None:
    mount(job)
    change(job)
    assert cli(job, "overlayfs commit m --to new") == (0, f"{job}/new\n", "")
    (job / "m/later").write_text("the mount goes on\n")
    assert cli(job, "overlayfs umount m") == (0, "", "")
    assert cli(job, "overlayfs mount --lower new --lower a --lower b m") == (0, "", "")
    assert sorted(os.listdir(job / "m")) == ["etc", "new", "share"]
    assert sorted(os.listdir(job / "m/etc")) == ["motd"]
    assert (job / "m/etc/motd").read_text() == "changed\n"


def test_commit_of_an_unmounted_upper(job: Path) -> None:
    mount(job)
    change(job)
    assert cli(job, "overlayfs umount m").code == 0
    line = "overlayfs commit --upper u --lower a --lower b --to new --json"
    made = json.loads(cli(job, line).out)
    assert (made["layer"], made["size"]) == (f"{job}/new", len("changed\nnew\n"))
    assert (job / "new/etc/motd").read_text() == "changed\n"
    assert (job / "u/etc/motd").read_text() == "changed\n"


def test_umount_unlocks_the_upper_at_once(job: Path) -> None:
    for _ in range(3):
        mount(job)
        change(job)
        assert cli(job, "overlayfs umount m") == (0, "", "")
        subprocess.run(["rm", "-r", *map(str, (job / "u").iterdir())], check=True)


@pytest.mark.parametrize("command", ["umount", "fusermount3 -u"])
def test_others_unmount_and_the_next_mount_waits(job: Path, command: str) -> None:
    mount(job)
    subprocess.run([*command.split(), str(job / "m")], check=True)
    mount(job)


def test_mount_through_mount_fuse3(job: Path) -> None:
    requirements.need_program("mount.fuse3")
    environment = {**os.environ, "PATH": f"{Path(program('overlayfs')).parent}:{os.environ['PATH']}"}
    line = ["mount.fuse3", "overlayfs-mount#none", str(job / "m"), "-o", f"ro,lowerdir={job}/a:{job}/b"]
    subprocess.run(line, check=True, env=environment, timeout=60)
    assert (job / "m/etc/motd").read_text() == "of a\n"
    assert (job / "m").is_mount()


def refused_mounts(job: Path) -> list[tuple[str, str]]:
    """Command lines that are refused while mounting, with the message."""
    none, file = job / "none", job / "b/share/file"
    mount, overlap = "overlayfs mount --lower a", "overlap: neither may be the other or lie inside it"
    return [
        (f"overlayfs mount --lower {none} m", f"overlayfs: lower layer {none} does not exist"),
        (f"overlayfs mount --lower {file} m", f"overlayfs: lower layer {file} is not a directory"),
        (f"{mount} --upper {none} m", f"overlayfs: upper {none} does not exist"),
        (f"{mount} --upper u --work {none} m", f"overlayfs: work directory {none} does not exist"),
        (f"{mount} --upper u --work {file} m", f"overlayfs: work directory {file} is not a directory"),
        (
            f"{mount} --upper u --lower u m",
            f"overlayfs: lower layer {job}/u is the upper {job}/u or lies inside it, and a layer must not change; "
            "name another directory",
        ),
        (f"{mount} --upper u --work u m", f"overlayfs: upper {job}/u and work directory {job}/u {overlap}"),
        (f"{mount} {none}", f"overlayfs: cannot mount on {none}: No such file or directory"),
        (f"{mount} {file}", f"overlayfs: cannot mount on {file}: Not a directory"),
        (
            "overlayfs mount --lower a --upper b --work u b/share",
            f"overlayfs: {job}/b/share is inside {job}/b, which is part of the stack; choose a mount point outside",
        ),
        ("overlayfs-mount -o lowerdir=none m", f"overlayfs-mount: lower layer {none} does not exist"),
        (
            "overlayfs-mount -o lowerdir=a /proc/version",
            "overlayfs-mount: cannot mount on /proc/version: Not a directory",
        ),
    ]


def test_a_refused_mount_is_32_and_leaves_nothing(job: Path) -> None:
    for line, sentence in refused_mounts(job):
        assert cli(job, line) == (32, "", sentence + "\n")
    assert sorted(os.listdir(job)) == ["a", "b", "m", "u"]


def test_a_work_directory_on_another_file_system(job: Path) -> None:
    requirements.need(os.stat("/dev/shm").st_dev != job.stat().st_dev, "needs a second file system at /dev/shm")
    ended = cli(job, "overlayfs mount --lower a --upper u --work /dev/shm m")
    sentence = f"work directory /dev/shm is not on the file system of upper {job}/u"
    assert ended == (32, "", f"overlayfs: {sentence}\n")


def test_a_second_mount_on_the_same_place(job: Path) -> None:
    mount(job)
    ended = cli(job, "overlayfs mount --lower a m")
    sentence = f"{job}/m is already a mount of overlayfs (pid {_found(job)['pid']}); unmount it first"
    assert ended == (32, "", f"overlayfs: {sentence}\n")


def test_refused_commits_are_1_and_leave_nothing(job: Path) -> None:
    commit = "overlayfs commit --upper u --lower a"
    for line, sentence in [
        ("overlayfs commit --upper u --lower none --to new", "lower layer none does not exist"),
        ("overlayfs commit --upper none --lower a --to new", "upper none does not exist"),
        (f"{commit} --to none/new", f"cannot make a layer in {job}/none: No such file or directory"),
        (f"{commit} --to b", f"{job}/b exists already; name a directory that does not"),
        (
            f"{commit} --to u/new",
            f"{job}/u/new lies inside a directory that this stack is made of; name a place outside",
        ),
    ]:
        assert cli(job, line) == (1, "", f"overlayfs: {sentence}\n")
        assert not os.listdir(job / "u")
    mount(job)
    ended = cli(job, f"{commit} --to new")
    assert ended == (
        1,
        "",
        f"overlayfs: upper u is in use by the mount at {job}/m (pid {_found(job)['pid']}); unmount it first\n",
    )
    assert not (job / "new").exists()


def test_refused_commits_of_a_mount(job: Path) -> None:
    mount(job)
    for target, sentence in [
        ("b", f"{job}/b exists already; name a directory that does not"),
        ("none/new", f"cannot make a layer in {job}/none: No such file or directory"),
        ("u/new", f"{job}/u/new lies inside a directory that this stack is made of; name a place outside"),
        ("m/new", f"{job}/m/new lies inside the mount itself; name a place outside"),
    ]:
        assert cli(job, f"overlayfs commit m --to {target}") == (1, "", f"overlayfs: {sentence}\n")
    change(job)


def test_a_read_only_mount_has_nothing_to_commit(job: Path) -> None:
    assert cli(job, "overlayfs mount --lower a m").code == 0
    sentence = "there is no upper to commit: the mount is read-only"
    assert cli(job, "overlayfs commit m --to new") == (1, "", f"overlayfs: {sentence}\n")


def test_an_upper_in_use_is_refused_with_its_holder(job: Path) -> None:
    mount(job)
    (job / "n").mkdir()
    pid = _found(job)["pid"]
    ended = cli(job, "overlayfs mount --lower a --lower b --upper u n")
    sentence = f"upper {job}/u is in use by the mount at {job}/m (pid {pid}); unmount it first"
    assert ended == (32, "", f"overlayfs: {sentence}\n")


def test_a_busy_mount_is_not_unmounted_and_lazily_it_is(job: Path) -> None:
    mount(job)
    with open(job / "m/etc/motd") as held:
        ended = cli(job, "overlayfs umount m")
        assert ended.code == 32 and ended.err == f"overlayfs: cannot unmount {job}/m: Device or resource busy\n"
        assert cli(job, "overlayfs umount --lazy m") == (0, "", "")
        assert held.read() == "of a\n"


def test_options_without_effect_are_noted(job: Path) -> None:
    ended = cli(job, "overlayfs mount -o lowerdir=a,threaded=1,max_write=4096 m")
    assert ended == (
        0,
        "",
        "overlayfs: note: option threaded has no effect here\noverlayfs: note: option max_write has no effect here\n",
    )


def test_strange_names_are_one_line_each(job: Path) -> None:
    mount(job)
    for name in (b"two\nlines", b"\xff"):
        os.mkdir(os.fsencode(job / "m") + b"/" + name)
    assert cli(job, "overlayfs diff m").out == 'A "/two\\nlines"\nA "/\\377"\n'
    paths = [each["path"] for each in json.loads(cli(job, "overlayfs diff m --json").out)["changes"]]
    assert [os.fsencode(path) for path in paths] == [b"/two\nlines", b"/\xff"]
