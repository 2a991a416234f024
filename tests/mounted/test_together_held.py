"""T9: everything that can be done to a file while it is copied up, and while a commit waits for the copy."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from overlayfs.mount import control_client
from tests.mounted.held import LIMIT, Hold
from tests.support import engines
from tests.support.campaign import Campaign
from tests.support.drivers import Stack
from tests.support.drivers.forked import ForkedImage, ForkedMount, load, unhashed
from tests.support.mutants import seeded
from tests.support.mutants.together import NO_LOCK
from tests.support.polling import until
from tests.support.requirements import need, need_root
from tests.support.spec import Link
from tests.support.spec import Tree as Spec

SIZE = 64 << 10
WRITERS = 8
PART = 40
OLD = bytes(range(256)) * (SIZE // 256)
NEW = OLD[:10] + b"new" + OLD[13:]
RENAMED = ("RENAME", "RENAME2")


@dataclass(frozen=True)
class Act:
    """An operation on the file `f` of a directory while `f` is copied up for a writer.

    requests: the kinds of request by which its arrival is noticed. left: the content of each name of the directory
    afterwards; data: that of the writer's handle. also: a further condition that holds then.
    """

    requests: tuple[str, ...]
    do: Callable[[Path], object]
    left: dict[str, bytes]
    data: bytes = NEW
    also: Callable[[Path], bool] = lambda at: True


def _open_and_read(at: Path) -> None:
    with open(at / "f", "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 10, 0) == OLD[:10]
        assert os.fstat(file.fileno()).st_size == SIZE


def _replace(at: Path) -> None:
    (at / "other").write_bytes(b"other")
    os.rename(at / "other", at / "f")


def _move_directory(at: Path) -> None:
    os.rename(at, at.with_name(at.name + "-"))
    os.rename(at.with_name(at.name + "-"), at)


ACTS = {
    "rename": Act(RENAMED, lambda at: os.rename(at / "f", at / "g"), {"g": NEW}),
    "rename its directory": Act(RENAMED, _move_directory, {"f": NEW}),
    "replace": Act(RENAMED, _replace, {"f": b"other"}),
    "unlink": Act(("UNLINK",), lambda at: os.unlink(at / "f"), {}),
    "chmod": Act(
        ("SETATTR",), lambda at: os.chmod(at / "f", 0o640), {"f": NEW}, also=lambda at: _mode(at / "f") == 0o100640
    ),
    "link": Act(("LINK",), lambda at: os.link(at / "f", at / "g"), {"f": NEW, "g": NEW}),
    "open": Act(("OPEN",), _open_and_read, {"f": NEW}),
    "truncate": Act(("SETATTR",), lambda at: os.truncate(at / "f", SIZE - 1), {"f": NEW[:-1]}, NEW[:-1]),
    "setxattr": Act(
        ("SETXATTR",),
        lambda at: os.setxattr(at / "f", "user.a", b"1"),
        {"f": NEW},
        also=lambda at: os.getxattr(at / "f", "user.a") == b"1",
    ),
}


def _mode(path: Path) -> int:
    return path.stat().st_mode


# --- the clients ---------------------------------------------------------------------------------------------


class Client(threading.Thread):
    """Performs one operation in a thread; `wrong` is the error it raised, if any."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.act = act
        self.wrong: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.act()
        except BaseException as error:
            self.wrong = error

    def ended(self) -> list[str]:
        """Wait for the end; return what is wrong."""
        self.join(LIMIT)
        if self.is_alive():
            return ["a request hangs"]
        return [] if self.wrong is None else [repr(self.wrong)]


class Scene:
    """A mount of directories `0`, `1`... in each of which there is a file `f`, in every second one with a twin."""

    def __init__(self, place: Path, rounds: int, kind: type[ForkedMount]) -> None:
        layer: Spec = {str(turn): _directory(turn) for turn in range(rounds)}
        self.hold = Hold()
        upper: Spec | None = None if kind is ForkedImage else {}
        with self.hold.applied(), unhashed():
            self.tree = kind(Stack(place, [layer], upper), {"engine": engines.current()})
        self.point = self.tree.stack.mountpoint

    def requests(self, kinds: tuple[str, ...]) -> int:
        """Return how many requests of these kinds have arrived."""
        found = control_client.Client.at(os.fsencode(self.point)).stats().requests
        return sum(found.get(kind, 0) for kind in kinds)

    def begin_commit(self) -> Client:
        """Commit; return when the commit is under way."""
        assert isinstance(self.tree, ForkedImage)
        intents = os.path.join(self.tree.store, b"intents")
        client = Client(self.tree.rotation)
        until(lambda: os.listdir(intents) or not client.is_alive())
        return client

    def end(self) -> None:
        """Unmount; nothing is left behind."""
        self.tree.close()
        self.tree.stack.check()


def _directory(turn: int) -> Spec:
    return {"f": OLD, "twin": Link(f"{turn}/f")} if turn % 2 else {"f": OLD}


def _write(path: Path, offset: int, data: bytes) -> int:
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, data, offset)
    return fd


def _stamp(path: Path, at: int) -> None:
    os.close(_write(path, at * 100, b"%03d" % at))


class Round:
    """One file being copied up for a writer, and one operation on it meanwhile."""

    def __init__(self, scene: Scene, turn: int, act: Act, *, commits: bool) -> None:
        self.scene, self.turn, self.act, self.commits = scene, turn, act, commits
        self.at = scene.point / str(turn)
        self.fd = -1

    def _write(self) -> None:
        self.fd = _write(self.at / "f", 10, b"new")

    def run(self) -> list[str]:
        """Run the round; return what is wrong."""
        scene, act = self.scene, self.act
        clients = [Client(self._write)]
        scene.hold.wait()
        before = scene.requests(act.requests)
        clients.append(Client(lambda: act.do(self.at)))
        until(lambda: scene.requests(act.requests) > before or not clients[1].is_alive())
        if self.commits:
            clients.append(scene.begin_commit())
        scene.hold.release()
        wrong = [word for client in clients for word in client.ended()]
        try:
            return [f"round {self.turn}: {word}" for word in (wrong or self.look())]
        finally:
            os.close(self.fd)

    def look(self) -> list[str]:
        """Return what is wrong afterwards."""
        more, act = self.scene.hold.count(), self.act
        left = dict(act.left)
        if self.turn % 2:
            left["twin"] = act.data
        shown = {name: (self.at / name).read_bytes() for name in os.listdir(self.at)}
        checks = {
            f"{more} more copy-ups": more <= self.commits,  # by a handle from before the commit
            "the writer sees something else": os.pread(self.fd, SIZE + 1, 0) == act.data,
            f"shown is {_short(shown)}": shown == left,
            "the further condition does not hold": act.also(self.at),
        }
        return [word for word, holds in checks.items() if not holds]


def _short(shown: dict[str, bytes]) -> dict[str, tuple[int, bytes]]:
    return {name: (len(data), data[:16]) for name, data in shown.items()}


def first_writers(scene: Scene, turn: int, *, commits: bool) -> list[str]:
    """Let many clients write to one file of a layer at the same time; return what is wrong."""
    path, before = scene.point / str(turn) / "f", scene.requests(("OPEN",))
    clients = [Client(partial(_stamp, path, at)) for at in range(WRITERS)]
    scene.hold.wait()
    until(lambda: scene.requests(("OPEN",)) >= before + WRITERS)
    if commits:
        clients.append(scene.begin_commit())
    scene.hold.release()
    wrong = [word for client in clients for word in client.ended()]
    more, expected = scene.hold.count(), bytearray(OLD)
    for at in range(WRITERS):
        expected[at * 100 : at * 100 + 3] = b"%03d" % at
    checks = {f"{more} more copy-ups": more <= commits, "a write is lost": path.read_bytes() == expected}
    return [f"round {turn}: {word}" for word in (*wrong, *(word for word, holds in checks.items() if not holds))]


@pytest.fixture
def make_scene(place: Path) -> Iterator[Callable[[int, type[ForkedMount]], Scene]]:
    """Factory of scenes."""
    need_root()
    need(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    load()
    made: list[Scene] = []

    def make(rounds: int, kind: type[ForkedMount]) -> Scene:
        made.append(Scene(place / f"s{len(made)}", rounds, kind))
        return made[-1]

    yield make
    for scene in made:
        scene.tree.kill()


@pytest.mark.campaign("T9")
@pytest.mark.parametrize("commits", [False, True], ids=["", "and commit"])
def test_first_writers(
    make_scene: Callable[[int, type[ForkedMount]], Scene], campaign: Campaign, commits: bool
) -> None:
    """One copy-up for all, and each write is there."""
    wrong: list[str] = []
    for rounds in _parts(campaign.size(5, 200)):
        scene = make_scene(rounds, ForkedImage if commits else ForkedMount)
        wrong += [word for turn in range(rounds) for word in first_writers(scene, turn, commits=commits)]
        scene.end()
    words = "and a commit, " if commits else ""
    campaign.held(f"{WRITERS} first writers, {words}engine {engines.current()}", campaign.size(5, 200), wrong)


def _parts(rounds: int) -> list[int]:
    """Return the rounds of each scene: few, since with every commit the stack grows and look-ups cost more."""
    return [PART] * (rounds // PART) + [rounds % PART] * bool(rounds % PART)


@pytest.mark.campaign("T9")
def test_mutant(make_scene: Callable[[int, type[ForkedMount]], Scene], campaign: Campaign) -> None:
    with seeded(NO_LOCK):
        scene = make_scene(1, ForkedMount)
    campaign.caught(f"{NO_LOCK}, engine {engines.current()}", 1, first_writers(scene, 0, commits=False))


@pytest.mark.campaign("T9")
@pytest.mark.parametrize("commits", [False, True], ids=["", "and commit"])
@pytest.mark.parametrize("act", ACTS)
def test_during_a_copy_up(
    make_scene: Callable[[int, type[ForkedMount]], Scene], campaign: Campaign, act: str, commits: bool
) -> None:
    """One copy-up, nothing lost, and no request hangs."""
    wrong: list[str] = []
    for rounds in _parts(campaign.size(4, 200)):
        scene = make_scene(rounds, ForkedImage if commits else ForkedMount)
        wrong += [word for turn in range(rounds) for word in Round(scene, turn, ACTS[act], commits=commits).run()]
        scene.end()
    what = f"a change{' and a commit' if commits else ''} during a copy-up, engine {engines.current()}"
    campaign.held(what, campaign.size(4, 200), wrong)
