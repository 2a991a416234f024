"""What this machine can do for overlayfs: one finding for each facility of kernel, system, store and podman.

The facts hold no name of a user, a host or a file of theirs, so that `overlayfs bugreport` can show them in public;
what names one is in `advice`, which is for this terminal only.
"""

import errno
import functools
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from overlayfs_cli.trial_mount import Trial, try_mount

OK, OFF, FAILED = "ok", "off", "failed"

LIBRARIES = ("backports.zstd", "click", "isal", "msgspec", "pyfuse3", "trio", "urllib3", "xxhash")
FUSE_DEVICE = "/dev/fuse"
KERNEL_ENGINE = (5, 4)  # Linux with FUSE 7.31
PASSTHROUGH = (6, 9)
ENGINE_PROGRAM = "overlayfs-mount"


@dataclass(frozen=True)
class Finding:
    """One facility. `state` is ok, off (overlayfs does without) or failed (nothing can be mounted)."""

    name: str
    state: str
    fact: str
    advice: str = ""


def examine(store: bytes) -> list[Finding]:
    """Return the findings for this machine, this user and the directory of a store, which need not exist.

    A stack is mounted for a moment, and files are created in the file system of the store; nothing of it is left.
    """
    trial = try_mount()
    return [
        *_programs(),
        _device(),
        _fusermount(),
        _mount(trial),
        _passthrough(trial),
        _user_namespaces(),
        _subordinate_ids(),
        _kernel_overlayfs(),
        *_store(store),
        _podman(),
    ]


def can_mount(findings: list[Finding]) -> bool:
    """Return whether a stack could be mounted."""
    return all(finding.state != FAILED for finding in findings if finding.name == "mount")


def kernel_version() -> tuple[int, ...]:
    """Return the first two numbers of the version of the running kernel."""
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed, by name."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _programs() -> Iterator[Finding]:
    """Kernel, Python and libraries."""
    release = os.uname().release
    versions = library_versions()
    if kernel_version() >= KERNEL_ENGINE:
        yield Finding("kernel", OK, f"Linux {release}")
    else:
        advice = "without Linux 5.4 the engine pyfuse3 serves mounts: pip install 'overlayfs[pyfuse3]'"
        yield Finding("kernel", OFF, f"Linux {release}, older than 5.4", "" if "pyfuse3" in versions else advice)
    yield Finding("python", OK, ".".join(map(str, sys.version_info[:3])))
    yield Finding("libraries", OK, ", ".join(f"{name} {version}" for name, version in versions.items()))
    if "pyfuse3" not in versions:
        advice = "for mounts with engine=pyfuse3: pip install 'overlayfs[pyfuse3]'"
        yield Finding("engine pyfuse3", OFF, "pyfuse3 is not installed", advice)


# FUSE.


def _device() -> Finding:
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        advice = {
            errno.ENOENT: "run modprobe fuse; in a container, start it with --device /dev/fuse",
            errno.EACCES: "run chmod 666 /dev/fuse as root",
            errno.EPERM: "start the container with --device /dev/fuse",
        }
        return Finding("/dev/fuse", FAILED, _reason(error), advice.get(error.errno or 0, "run modprobe fuse"))
    return Finding("/dev/fuse", OK, "can be opened")


def _fusermount() -> Finding:
    """The program that mounts for users who are not root."""
    name, needed = "fusermount3", os.geteuid() != 0
    program = shutil.which(name)
    if program is None:
        return Finding(name, FAILED if needed else OFF, "is not installed", "for users other than root, install fuse3")
    found = os.stat(program)
    version = _version(program, "--version")
    if not (found.st_mode & stat.S_ISUID and found.st_uid == 0):
        advice = f"for users other than root: chown root {program} && chmod u+s {program}"
        return Finding(name, FAILED if needed else OFF, f"version {version}, not setuid root", advice)
    return Finding(name, OK, f"version {version}, setuid root")


def _mount(trial: Trial) -> Finding:
    if trial.error is None:
        return Finding("mount", OK, f"a stack could be mounted, with engine {trial.engine}")
    return Finding("mount", FAILED, "no stack could be mounted", trial.error)


def _passthrough(trial: Trial) -> Finding:
    name = "passthrough"
    if kernel_version() < PASSTHROUGH:
        return Finding(name, OFF, "needs Linux 6.9", "data goes through the daemon until the kernel is newer")
    if os.geteuid() != 0:
        return Finding(name, OFF, "needs root", "mount as root to let data bypass the daemon")
    if trial.passes_through:
        return Finding(name, OK, "data of a new file bypassed the daemon")
    advice = "data goes through the daemon: use a kernel with CONFIG_FUSE_PASSTHROUGH and engine=kernel"
    return Finding(name, OFF, "data of a new file went through the daemon", advice)


# The kernel.

_USERNS_SWITCHES = {  # file below /proc/sys: the value that forbids, the one that allows
    "kernel/unprivileged_userns_clone": ("0", "1"),
    "kernel/apparmor_restrict_unprivileged_userns": ("1", "0"),
    "user/max_user_namespaces": ("0", "15000"),
}


def _user_namespaces() -> Finding:
    """User namespaces: rootless podman needs them, a mount does not."""
    name = "user namespaces"
    for switch, (forbids, allows) in _USERNS_SWITCHES.items():
        if _content(f"/proc/sys/{switch}") == forbids:
            shown = switch.replace("/", ".")
            return Finding(name, OFF, f"{shown} is {forbids}", f"for rootless containers: sysctl {shown}={allows}")
    if shutil.which("unshare") is None:
        return Finding(name, OFF, "unshare(1) is not installed", "install util-linux to find out")
    done = subprocess.run(
        ("unshare", "--user", "--map-root-user", "true"), stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode:
        advice = "for rootless containers: leave the chroot, or allow them in the container's seccomp profile"
        return Finding(name, OFF, "one could not be created", advice)
    return Finding(name, OK, "one could be created")


def _subordinate_ids() -> Finding:
    """Ranges of subuid(5) and subgid(5) for this user, and the programs that map them."""
    name = "subordinate ids"
    if os.geteuid() == 0:
        return Finding(name, OK, "root needs none")
    user, number = _user_name(), str(os.getuid())
    sizes = [_subordinate(path, (user, number)) for path in ("/etc/subuid", "/etc/subgid")]
    if not all(sizes):
        advice = f"for rootless containers: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
        return Finding(name, OFF, f"{sizes[0]} user ids, {sizes[1]} group ids", advice)
    if shutil.which("newuidmap") is None:
        return Finding(name, OFF, "newuidmap is not installed", "for rootless containers, install uidmap")
    return Finding(name, OK, f"{sizes[0]} user ids, {sizes[1]} group ids")


def _subordinate(path: str, names: tuple[str, ...]) -> int:
    """Return how many ids a file grants to a user."""
    lines = (line.split(":") for line in _content(path).splitlines())
    return sum(int(words[2]) for words in lines if len(words) == 3 and words[0] in names and words[2].isdigit())


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _kernel_overlayfs() -> Finding:
    """The kernel's own overlayfs, which can mount the same layers."""
    known = {line.split()[-1] for line in _content("/proc/filesystems").splitlines() if line}
    if "overlay" in known:
        return Finding("kernel overlayfs", OK, "is there")
    advice = "to mount the same layers with the kernel: modprobe overlay"
    return Finding("kernel overlayfs", OFF, "is not in /proc/filesystems", advice)


# The file system of the store.


def _store(store: bytes) -> Iterator[Finding]:
    """What layers and uppers in the store can carry."""
    from overlayfs_cli.benchmark.machine import filesystem

    place = _existing(Path(os.fsdecode(store)))
    kind = filesystem(place)
    try:
        with tempfile.TemporaryDirectory(prefix=".overlayfs-doctor-", dir=place) as scratch:
            yield Finding("store", OK, f"on {kind}")
            yield from (_tried(Path(scratch), *probe) for probe in _PROBES)
    except OSError as error:
        advice = f"make {place} writable, or choose another directory with --store or $OVERLAYFS_STORE"
        yield Finding("store", OFF, f"on {kind}: {_reason(error)}", advice)


def _existing(path: Path) -> Path:
    """Return the path itself or, if it does not exist, the nearest directory above that does."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if os.path.isdir(each))


def _set_attribute(scratch: Path, name: str) -> None:
    os.setxattr(scratch, name, b"y")


def _make_whiteout(scratch: Path) -> None:
    os.mknod(scratch / "whiteout", stat.S_IFCHR, os.makedev(0, 0))


def _clone(scratch: Path) -> None:
    from overlayfs import sysio

    (scratch / "from").write_bytes(b"x" * 4096)
    with open(scratch / "from", "rb") as source, open(scratch / "to", "wb") as target:
        if not sysio.clone_file(source.fileno(), target.fileno()):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


_PROBES: tuple[tuple[str, Callable[[Path], None], str], ...] = (
    (
        "trusted xattrs",
        functools.partial(_set_attribute, name="trusted.overlay.doctor"),
        "marks are written as user.overlay.*, which the kernel's overlayfs reads with userxattr",
    ),
    (
        "user xattrs",
        functools.partial(_set_attribute, name="user.overlay.doctor"),
        "mount as root, or keep uppers on a file system with extended attributes",
    ),
    (
        "whiteouts",
        _make_whiteout,
        "deletions are written as xattr whiteouts, which not every program understands",
    ),
    ("reflinks", _clone, "keep the store on XFS or Btrfs: a copy-up then shares the data"),
)


def _tried(scratch: Path, name: str, probe: Callable[[Path], None], advice: str) -> Finding:
    try:
        probe(scratch)
    except OSError as error:
        return Finding(name, OFF, _reason(error), advice)
    return Finding(name, OK, "work on the file system of the store")


# Containers.


def _podman() -> Finding:
    """Whether podman and buildah mount with this program: containers-storage.conf(5)."""
    name = "podman"
    if not (shutil.which("podman") or shutil.which("buildah")):
        return Finding(name, OFF, "is not installed", "to run containers on overlayfs, install podman")
    path = next((each for each in _storage_conf_paths() if os.path.isfile(each)), None)
    mine = Path(sys.executable).with_name(ENGINE_PROGRAM)
    advice = f'in storage.conf: driver = "overlay", and under [storage.options.overlay]: mount_program = "{mine}"'
    if path is None:
        return Finding(name, OFF, "there is no storage.conf", advice)
    try:
        storage = tomllib.loads(path.read_text()).get("storage", {})
    except (OSError, ValueError):
        return Finding(name, OFF, "its storage.conf cannot be read", f"mend {path}")
    driver, program = storage.get("driver", ""), _mount_program(storage)
    if driver != "overlay":
        return Finding(name, OFF, "the driver in its storage.conf is not overlay", advice)
    if program is None:
        return Finding(name, OFF, "mount_program is not set in its storage.conf", advice)
    if os.path.basename(program) != ENGINE_PROGRAM:
        return Finding(name, OFF, "mount_program in its storage.conf is another program", advice)
    if not os.access(program, os.X_OK):
        return Finding(name, OFF, "mount_program in its storage.conf cannot be run", advice)
    return Finding(name, OK, f"driver overlay, mount_program {ENGINE_PROGRAM}")


def _storage_conf_paths() -> Iterator[Path]:
    if named := os.environ.get("CONTAINERS_STORAGE_CONF"):
        yield Path(named)
        return
    if os.geteuid() != 0:
        home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        yield Path(home, "containers/storage.conf")
    yield Path("/etc/containers/storage.conf")
    yield Path("/usr/share/containers/storage.conf")


def _mount_program(storage: dict[str, Any]) -> str | None:
    options = storage.get("options", {})
    found = options.get("overlay", {}).get("mount_program") or options.get("mount_program")
    return found if isinstance(found, str) else None


# Small things.


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _content(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _version(*words: str) -> str:
    """Return the last word of the first line that a program prints."""
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    return next(iter(done.stdout.splitlines()), "").rpartition(" ")[2]
