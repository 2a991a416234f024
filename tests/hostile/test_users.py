"""T15: permissions, and the effects on owners, set-id bits and capabilities, are those of ext4."""

import errno
import os
import shutil
import stat
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from overlayfs.mount import runtime_state
from overlayfs.store.store import LayerStore
from tests.hostile import forgery, rights
from tests.hostile.rights import Check
from tests.mounted.scene import MODULES
from tests.store.samples import add_image
from tests.support import engines, processes, serving, syscalls
from tests.support.builder import build
from tests.support.campaign import Campaign
from tests.support.disks import disk
from tests.support.drivers.posix import PosixRaw
from tests.support.dump import Dump, differences, dump
from tests.support.fork_server import ForkServer
from tests.support.outcome import errno_of
from tests.support.polling import until
from tests.support.requirements import need_root
from tests.support.serving import MountSpec
from tests.support.users import ALICE, run_as

pytestmark = pytest.mark.root
WHERE = ("lower", "upper")
_DETACH = 2
_NOSUID, _NODEV, _REMOUNT = 2, 4, 32  # mount(2)
_LAG = 10**9  # nanoseconds; more than the clock of a file system may be behind


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    """Runs daemons in processes."""
    need_root()
    with ForkServer(*MODULES) as started:
        yield started


@contextmanager
def mounted(fork_server: ForkServer, base: Path, words: str, **more: Any) -> Iterator[tuple[Path, int]]:
    """A mount of directories below `base`, its point and the pid of its daemon."""
    point = base / "m"
    point.mkdir(exist_ok=True)
    spec = MountSpec(os.fsencode(point), os.fsencode(base / "log"), words.encode(), **more)
    pid = fork_server.run(serving.serve, spec).value
    try:
        yield point, pid
    finally:
        syscalls.umount(os.fsencode(point), _DETACH)
        assert processes.reap(pid) == 0


class Seen(NamedTuple):
    """The results of the checks, and the tree afterwards."""

    results: list[str]
    tree: Dump


class Scene:
    """The same objects on a plain ext4, in a lower layer and in an upper, all on one disk."""

    def __init__(self, base: Path, fork_server: ForkServer, wanted: list[Check]) -> None:
        self.base = base
        self.wanted = wanted
        self._fork_server = fork_server
        for name in ("plain", *WHERE):
            (base / name).mkdir()
            build(base / name, rights.tree(wanted))
        self._began = time.time_ns() - _LAG

    def plain(self) -> Seen:
        """Run the checks on the plain tree."""
        return Seen(rights.results(self.base / "plain", self.wanted), self._dump(self.base / "plain"))

    def mounted(self, where: str, engine: str, mutant: str | None = None) -> tuple[Seen, Dump]:
        """Run the checks on a mount; return the results, and the tree that another mount shows afterwards."""
        with self._mount(where, engine, mutant) as (point, _):
            seen = Seen(rights.results(point, self.wanted), self._dump(point))
        with self._mount(where, engine, mutant) as (point, _):
            return seen, self._dump(point)

    def _dump(self, top: Path) -> Dump:
        raw = PosixRaw(os.fsencode(top))
        try:
            found = dump(raw, times_before=self._began)
        finally:
            raw.close()
        del found[b""]  # the root of a mount is that of the upper
        return found

    def _mount(self, where: str, engine: str, mutant: str | None) -> AbstractContextManager[tuple[Path, int]]:
        base = self.base / f"of-{where}"
        for name in ("empty", "work"):
            (base / name).mkdir(exist_ok=True, parents=True)
        lower, upper = (base / "empty", self.base / where)[:: -1 if where == "lower" else 1]
        words = f"lowerdir={lower},upperdir={upper},workdir={base}/work,suid,dev,engine={engine}"
        return mounted(self._fork_server, base, words, mutant=mutant)


def violations(wanted: list[Check], plain: Seen, seen: Seen, later: Dump) -> list[str]:
    """Every result and every object that differs from ext4."""
    lines = [
        f"{check.role}, {check.act}, {check.object}: {result}, on ext4 {expected}"
        for check, result, expected in zip(wanted, seen.results, plain.results, strict=True)
        if result != expected
    ]
    for when, tree in (("", seen.tree), ("mounted again, ", later)):
        for line in differences(tree, plain.tree):
            number = line.partition("b'")[2].partition("/")[0].rstrip("'")
            about = wanted[int(number)] if number.isdigit() else line
            lines.append(f"{when}{about}: {line}")
    return lines


@pytest.mark.campaign("T15")
def test_each_user_may_do_what_ext4_allows(campaign: Campaign, fork_server: ForkServer, place: Path) -> None:
    wanted = rights.checks()
    for engine in engines.NAMES if campaign.full else (engines.current(),):
        with disk("ext4", place / engine, 512 << 20) as point:
            scene = Scene(point, fork_server, wanted)
            plain = scene.plain()
            for where in WHERE:
                found = violations(wanted, plain, *scene.mounted(where, engine))
                when = {"lower": "before copy-up", "upper": "after copy-up"}[where]
                campaign.held(f"acts of three users, {when}, engine {engine}", len(wanted), found)


@pytest.mark.campaign("T15")
def test_a_mutant_that_keeps_set_id_bits_is_caught(campaign: Campaign, fork_server: ForkServer, place: Path) -> None:
    wanted = rights.checks(rights.SET_ID)
    with disk("ext4", place / "disk", 128 << 20) as point:
        scene = Scene(point, fork_server, wanted)
        plain = scene.plain()
        found = [
            each
            for where in WHERE
            for each in violations(wanted, plain, *scene.mounted(where, engines.current(), mutant="M9"))
        ]
    campaign.caught("M9", 2 * len(wanted), found)


@pytest.mark.campaign("T15")
def test_no_user_can_forge_a_mark(campaign: Campaign, fork_server: ForkServer, place: Path) -> None:
    for engine in engines.NAMES if campaign.full else (engines.current(),):
        base = place / engine
        for name, tree in (("top", forgery.TREE), ("low", forgery.BELOW), ("u", {}), ("w", {})):
            (base / name).mkdir(parents=True)
            build(base / name, tree)
        words = f"lowerdir={base}/top:{base}/low,upperdir={base}/u,workdir={base}/w,engine={engine}"
        for turn in ("first", "again"):  # what was set the first time is not a mark the second time
            with mounted(fork_server, base, words) as (point, _):
                points, wrong = forgery.break_rules(point)
            campaign.held(f"forged marks, engine {engine}", points, [f"{turn}: {each}" for each in wrong])


@pytest.mark.campaign("T15")
def test_the_programs_own_files_are_closed_to_users(campaign: Campaign, fork_server: ForkServer, place: Path) -> None:
    store = os.fsencode(place / "store")
    umask = os.umask(0)
    try:
        with LayerStore(store) as opened:
            add_image(opened, "site", {"f": "f"})
    finally:
        os.umask(umask)
    spec = {"store": store, "image": "site", "workspace": "w"}
    with mounted(fork_server, place, f"engine={engines.current()}", **spec) as (_, pid):
        until(runtime_state.socket_path(pid).exists)
        inside = [path for path in (place / "store").rglob("*") if "tree" not in path.parts]
        places = [place / "store", *inside, runtime_state.run_directory(), runtime_state.record_path(pid)]
        points, wrong = forgery.reach_into(places, [runtime_state.socket_path(pid)])
    campaign.held("the store, the records and the socket of others", points, wrong)


_READS_ALL = struct.pack("<5I", 0x0200_0001, 1 << 2, 0, 0, 0)  # CAP_DAC_READ_SEARCH, effective (capability.h)
_GIVES, _TAKES = ("0", "secret", None), (str(ALICE.uid), "", errno.EACCES)


@pytest.mark.campaign("T15")
@pytest.mark.parametrize("restricted", [False, True])
def test_a_layer_gives_the_rights_of_its_own_mount(
    campaign: Campaign, fork_server: ForkServer, place: Path, restricted: bool
) -> None:
    """Set-id bits, capabilities and devices of a layer give no rights through another mount (CVE-2016-1576)."""
    expected = _TAKES if restricted else _GIVES
    wrong: list[str] = []
    (place / "secret").write_text("secret")
    (place / "secret").chmod(0o600)
    for engine in engines.NAMES if campaign.full else (engines.current(),):
        with disk("tmpfs", place / f"disk-{engine}", 16 << 20) as layer:
            _fill(layer)
            if restricted:
                syscalls.mount(b"none", os.fsencode(layer), b"tmpfs", _REMOUNT | _NOSUID | _NODEV, b"")
            upper = _upper(place / engine)
            words = f"lowerdir={layer},upperdir={upper},workdir={upper}.work,suid,dev,engine={engine}"
            with mounted(fork_server, place / engine, words) as (point, _):
                for when in ("below", "copied up"):
                    result = run_as(ALICE, partial(_use, point, place / "secret"))
                    wrong += [f"{when}, {engine}: {result}"] * (result != expected)
                    os.utime(point / "id")
                    os.utime(point / "cat")
            wrong += [f"copied up, {engine}: {each}" for each in _rights_in(upper) if restricted]
    campaign.held(f"rights of a {'nosuid' if restricted else 'suid'} layer", 6 * len(_GIVES), wrong)


def _fill(layer: Path) -> None:
    for program in ("id", "cat"):
        shutil.copy(f"/usr/bin/{program}", layer / program)
    (layer / "id").chmod(0o4755)
    os.setxattr(layer / "cat", "security.capability", _READS_ALL)
    os.mknod(layer / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (layer / "null").chmod(0o666)


def _upper(base: Path) -> Path:
    (base / "upper.work").mkdir(parents=True)
    (base / "upper").mkdir()
    return base / "upper"


def _use(point: Path, secret: Path) -> tuple[str, str, int | None]:
    """Return the output of `id`, of `cat` for a file that only root may read, and the result of opening a device."""
    shown = [
        subprocess.run([point / program, *words], capture_output=True, text=True, check=False).stdout.strip()
        for program, words in (("id", ["-u"]), ("cat", [secret]))
    ]
    return shown[0], shown[1], errno_of(lambda: os.close(os.open(point / "null", os.O_RDONLY)))


def _rights_in(upper: Path) -> list[str]:
    """Return what in an upper would give rights to a user who can reach it."""
    found = [
        f"{path.name} is set-id" for path in upper.iterdir() if path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)
    ]
    return found + [
        f"{path.name} has capabilities" for path in upper.iterdir() if "security.capability" in os.listxattr(path)
    ]
