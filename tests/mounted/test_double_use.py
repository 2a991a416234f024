"""T16: an upper, a work directory and a workspace have one user at a time, whatever path a second one takes."""

import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from overlayfs import StackConfig, Store
from overlayfs.mount import control_client
from overlayfs.mount.control_protocol import CommitImage
from overlayfs.store import workspaces
from overlayfs.store.copy_upper import commit_unmounted
from tests.mounted.scene import PATIENCE, Scene
from tests.support import engines, processes, syscalls
from tests.support.campaign import Campaign
from tests.support.fork_server import ForkServer
from tests.support.polling import until

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait long for a workspace in this process either."""
    monkeypatch.setattr(workspaces, "_LEAVING", PATIENCE)


Case = Callable[[Scene], str]
"""Tries one kind of double use; returns the message of the refusal, empty when nothing was refused."""


def _same(scene: Scene) -> str:
    with scene.mounted(scene.words()):
        return scene.second(scene.words())


def _other_work(scene: Scene) -> str:
    with scene.mounted(scene.words()):
        return scene.second(scene.words(work="other.w"))


def _other_upper(scene: Scene) -> str:
    with scene.mounted(scene.words()):
        return scene.second(scene.words(upper="other"))


def _by_bind_mount(scene: Scene) -> str:
    with scene.mounted(scene.words()), scene.bound(".", "alias"):
        return scene.second(scene.words(upper="alias/u", work="alias/w"))


def _by_link(scene: Scene) -> str:
    (scene.base / "link").symlink_to(scene.base)
    with scene.mounted(scene.words()):
        return scene.second(scene.words(upper="link/u", work="link/w"))


def _by_namespace(scene: Scene) -> str:
    with scene.mounted(scene.words()):
        return scene.second(scene.words(), own_namespace=True)


def _from_a_namespace(scene: Scene) -> str:
    with scene.mounted(scene.words(), own_namespace=True):
        return scene.second(scene.words())


def _inside(scene: Scene) -> str:
    (scene.base / "u" / "inner" / "u").mkdir(parents=True)
    (scene.base / "u" / "inner" / "w").mkdir()
    with scene.mounted(scene.words()):
        return scene.second(scene.words(upper="u/inner/u", work="u/inner/w"))


def _around(scene: Scene) -> str:
    (scene.base / "u" / "inner").mkdir()
    with scene.mounted(scene.words(upper="u/inner", work="other.w")):
        return scene.second(scene.words())


def _inside_by_bind_mount(scene: Scene) -> str:
    (scene.base / "u" / "inner").mkdir()
    with scene.mounted(scene.words()), scene.bound("u/inner", "alias"):
        return scene.second(scene.words(upper="alias", work="other.w"))


def _of_the_kernel(scene: Scene) -> str:
    syscalls.mount(b"overlay", os.fsencode(scene.base / "m"), b"overlay", 0, scene.words().encode())
    try:
        return scene.second(scene.words())
    finally:
        syscalls.umount(os.fsencode(scene.base / "m"))


def _commit_of_the_upper(scene: Scene) -> str:
    low, upper, work = (os.fsencode(scene.base / name) for name in ("low", "u", "w"))
    config = StackConfig((low,), upper, work, lock_wait=PATIENCE)
    with scene.mounted(scene.words()):
        return scene.refusal(lambda: commit_unmounted(config, os.fsencode(scene.base / "layer")))


def _workspace_again(scene: Scene) -> str:
    wanted = scene.image()
    with scene.mounted("", **wanted):
        return scene.second("", **wanted)


def _commit_of_a_workspace(scene: Scene) -> str:
    wanted = scene.image()
    with scene.mounted("", **wanted), Store(wanted["store"]) as store:
        return scene.refusal(lambda: store.commit_workspace("draft", allow_empty=True))


def _removal_of_a_workspace(scene: Scene) -> str:
    wanted = scene.image()
    with scene.mounted("", **wanted), Store(wanted["store"]) as store:
        return scene.refusal(lambda: store.workspaces.remove("draft"))


def _upper_of_a_workspace(scene: Scene) -> str:
    wanted = scene.image()
    with scene.mounted("", **wanted):
        room = scene.base / "store" / "workspaces" / "draft"
        return scene.second(scene.words(upper=f"{room}/upper", work=f"{room}/work"))


CASES: dict[str, tuple[Case, str]] = {
    "the same directories": (_same, "is in use by the mount at"),
    "the same upper, another work directory": (_other_work, "upper .* is in use by the mount at"),
    "the same work directory, another upper": (_other_upper, "work directory .* is in use by the mount at"),
    "by a bind mount": (_by_bind_mount, "is in use by the mount at"),
    "by a symbolic link": (_by_link, "is in use by the mount at"),
    "from another mount namespace": (_by_namespace, "is in use by"),
    "in use in another mount namespace": (_from_a_namespace, "is in use by"),
    "an upper inside one in use": (_inside, "upper .* is inside .*, the upper of the mount at"),
    "an upper around one in use": (_around, "upper .* contains .*, the upper of the mount at"),
    "an upper inside one in use, by a bind mount": (_inside_by_bind_mount, "upper .* is inside .*, the upper of"),
    "in use by the kernel's overlayfs": (_of_the_kernel, " is .*, the .* of the kernel's overlayfs at"),
    "a commit of an upper in use": (_commit_of_the_upper, "is in use by"),
    "a workspace that is mounted": (_workspace_again, "workspace draft is in use by the mount at"),
    "a commit of a mounted workspace": (_commit_of_a_workspace, "workspace draft is mounted"),
    "the removal of a mounted workspace": (_removal_of_a_workspace, "workspace draft is mounted"),
    "the upper of a mounted workspace": (_upper_of_a_workspace, "is in use by the mount at"),
}


OF_LOCKS = tuple(CASES)[:7]


def _violations(
    place: Path, fork_server: ForkServer, engine: str, names: Iterable[str] = CASES, mutant: str | None = None
) -> list[str]:
    """Return the cases in which a second mount was accepted, or refused with another message."""
    found = []
    for number, name in enumerate(names):
        case, wanted = CASES[name]
        sentence = case(Scene(place / f"{engine}{number}", fork_server, engine, mutant))
        if re.search(wanted, sentence) is None or "[exit code" in sentence:
            found.append(f"{name}: {sentence or 'accepted'}")
    return found


@pytest.mark.campaign("T16")
def test_one_user_at_a_time(campaign: Campaign, fork_server: ForkServer, place: Path) -> None:
    for engine in engines.NAMES if campaign.full else (engines.current(),):
        found = _violations(place, fork_server, engine)
        campaign.held(f"ways to use a stack twice, engine {engine}", len(CASES), found)


@pytest.mark.campaign("T16")
def test_a_missing_lock_is_noticed(campaign: Campaign, fork_server: ForkServer, place: Path) -> None:
    campaign.caught("M8", len(OF_LOCKS), _violations(place, fork_server, engines.current(), OF_LOCKS, "M8"))


HOLE = 2 << 40  # bytes: enough to be hashed for a while


@contextmanager
def _hashing(scene: Scene) -> Iterator[None]:
    """Commit the mounted workspace; within this context its hashing goes on, in a process that the daemon began."""
    before = processes.children()
    with open(scene.base / "m" / "hole", "wb") as stream:
        stream.truncate(HOLE)
    control_client.Client.at(os.fsencode(scene.base / "m")).commit_image(CommitImage(image="next"))
    until(lambda: processes.children() - before)
    (hasher,) = processes.children() - before
    os.kill(hasher, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(hasher, signal.SIGKILL)
        processes.reap(hasher)


@pytest.mark.campaign("T16")
@pytest.mark.parametrize("what", ["directories", "a workspace", "a workspace whose layer is being hashed"])
def test_the_locks_of_a_dead_daemon_are_free(
    campaign: Campaign, fork_server: ForkServer, place: Path, what: str
) -> None:
    """kill -9 of the daemon, with work in progress."""
    for engine in engines.NAMES if campaign.full else (engines.current(),):
        scene = Scene(place / engine, fork_server, engine)
        more = {} if what == "directories" else scene.image()
        options = "" if more else scene.words()
        with scene.mounted(options, **more) as pid, _hashing(scene) if "hashed" in what else nullcontext():
            os.kill(pid, signal.SIGKILL)
            assert processes.ends(pid)
            sentence = scene.second(options, **more)
        campaign.held(f"locks of dead owners, engine {engine}", 1, [f"{what}: {sentence}"] * bool(sentence))
