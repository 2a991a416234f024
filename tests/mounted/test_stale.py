"""T17: however a daemon died, the next mount needs no manual step, and reports about the dead one are right."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from overlayfs.errors import MountError, UserError
from overlayfs.mount import control_client, mounts, unmount
from tests.mounted import dying
from tests.mounted.scene import Scene
from tests.support import engines, processes
from tests.support.campaign import Campaign
from tests.support.fork_server import ForkServer, HungError
from tests.support.outcome import errno_of, name_of
from tests.support.polling import until

pytestmark = pytest.mark.root

PROGRAM = str(Path(sys.executable).with_name("overlayfs"))
GONE = {errno.ENOTCONN, errno.ECONNABORTED}
LIMIT = 30.0  # seconds, for what must not hang


def works(scene: Scene) -> list[str]:
    """Mount without any preparation; return what is wrong with that."""
    try:
        pid = scene.start(scene.spec(lock_wait=5.0))
    except (UserError, HungError) as error:
        return [f"the next mount: {error}"]
    found = []
    if scene.mounts() != 1:
        found.append(f"{scene.mounts()} mounts are stacked")
    (scene.point / "new").write_bytes(b"new")
    if (scene.point / "f").read_bytes() != b"f" or (scene.point / "new").read_bytes() != b"new":
        found.append("the next mount shows something else")
    os.unlink(scene.point / "new")
    unmount.unmount(os.fsencode(scene.point))
    if processes.reap(pid):
        found.append("the next daemon ended with an error")
    if os.listdir(scene.base / "w" / "work"):
        found.append(f"the work directory holds {os.listdir(scene.base / 'w' / 'work')}")
    return found


def _killed(scene: Scene) -> int:
    """Mount, and kill the daemon."""
    pid = scene.start(scene.spec())
    os.kill(pid, signal.SIGKILL)
    processes.reap(pid)
    return pid


# --- ways to die ---------------------------------------------------------------------------------------------

Way = Callable[[Scene], list[str]]
"""Lets a daemon die, or hang; returns what is wrong before the next mount is tried."""


def _at_rest(scene: Scene) -> list[str]:
    _killed(scene)
    found = errno_of(os.statvfs, scene.point)
    return [] if found in GONE else [f"a dead mount answers {name_of(found)}"]


def _with_open_files(scene: Scene) -> list[str]:
    pid = scene.start(scene.spec())
    reader, writer = os.open(scene.point / "f", os.O_RDONLY), os.open(scene.point / "made", os.O_WRONLY | os.O_CREAT)
    directory = os.open(scene.point, os.O_RDONLY)
    os.kill(pid, signal.SIGKILL)
    processes.reap(pid)
    answers = {
        "fstat": errno_of(os.statvfs, reader),
        "write": errno_of(os.write, writer, b"x"),
        "list": errno_of(os.listdir, directory),
    }
    for fd in (reader, writer, directory):
        errno_of(os.close, fd)
    (scene.base / "u" / "made").unlink()
    return [f"{what}: {name_of(answer)}" for what, answer in answers.items() if answer not in GONE | {None}]


def _with_working_directory(scene: Scene) -> list[str]:
    (scene.base / "low" / "d").mkdir()
    pid = scene.start(scene.spec())
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=scene.point / "d") as inside:
        os.kill(pid, signal.SIGKILL)
        processes.reap(pid)
        found = works(scene)
        assert inside.stdin is not None
        inside.stdin.close()
    return found


def _thrice(scene: Scene) -> list[str]:
    for _ in range(3):
        _killed(scene)
    return []


def _then_unmounted(scene: Scene) -> list[str]:
    _killed(scene)
    done = subprocess.run([PROGRAM, "umount", scene.point], capture_output=True, text=True, timeout=LIMIT, check=False)
    gone = scene.mounts() == 0
    return [] if (done.returncode, done.stderr, gone) == (0, "", True) else [f"umount: {done.returncode} {done.stderr}"]


def _listed(scene: Scene) -> list[str]:
    """A dead mount is listed, and `overlayfs commit` reports that no daemon answers."""
    _killed(scene)
    words = [PROGRAM, "commit", str(scene.point), "--to", str(scene.base / "layer")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, check=False)
    expected = f"overlayfs: no daemon of this user answers for {scene.point}; unmount it or ask as its owner\n"
    return [] if (done.returncode, done.stderr) == (1, expected) else [f"commit: {done.returncode} {done.stderr}"]


@contextmanager
def _stopped(scene: Scene) -> Iterator[int]:
    """A mount whose daemon is stopped; it is continued and reaped at the end."""
    pid = scene.start(scene.spec())
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGCONT)
        scene.clear()
        processes.reap(pid)


def _limited(act: Callable[[], object], wanted: str) -> list[str]:
    """Return what is wrong with the refusal of an operation on a mount whose daemon is stopped."""
    began = time.monotonic()
    try:
        act()
    except MountError as error:
        sentence = str(error)
    else:
        sentence = "nothing"
    late = [f"it took {time.monotonic() - began:.0f} s"] if time.monotonic() - began > LIMIT else []
    return late if wanted in sentence else [f"it said {sentence!r}", *late]


def _stopped_and_unmounted(scene: Scene) -> list[str]:
    with _stopped(scene):
        return _limited(lambda: unmount.unmount(os.fsencode(scene.point), wait=0.5), "still runs after 0.5 s")


def _stopped_in_the_middle(scene: Scene) -> list[str]:
    """With a client that waits for a reply: it gets an error."""
    with _stopped(scene), subprocess.Popen(["stat", scene.point / "f"], stderr=subprocess.DEVNULL) as client:
        until(lambda: "request_wait_answer" in Path(f"/proc/{client.pid}/stack").read_text())
        mount = mounts.find(os.fsencode(scene.point))
        unmount.abort(mount)
        late = [] if client.wait(LIMIT) else ["the client was answered"]
        return late + _limited(lambda: unmount.unmount(os.fsencode(scene.point), wait=0.5), "still runs after 0.5 s")


def _stopped_and_mounted_over(scene: Scene) -> list[str]:
    """Mounting over it does not wait for it."""
    with _stopped(scene) as pid:
        return _limited(lambda: scene.start(scene.spec()), f"(pid {pid}); it has not answered for 5 s")


def _stopped_and_killed(scene: Scene) -> list[str]:
    pid = scene.start(scene.spec())
    os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    processes.reap(pid)
    return []


@contextmanager
def _killed_flushing(scene: Scene, by_handle: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon that was killed while one of its threads waited for the writeback of a page of a client, which lives on.

    Only the reply of the daemon to that WRITE ends such a wait.
    """
    cached = ",io=cached" if scene.engine == "kernel" else ""
    pid = scene.start(scene.spec(scene.words() + cached), partial(dying.serve_never_writing, by_handle))
    mount = mounts.find(os.fsencode(scene.point))
    words = [sys.executable, "-c", _DIRTY, str(scene.point / "f")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
        assert client.stdin is not None and client.stdout is not None
        assert client.stdout.readline() == b"dirty\n"
        asking = threading.Thread(target=_ask_to_sync, args=(mount.mountpoint,))
        asking.start()
        until(lambda: any(_WAITING in stack for stack in _stacks(pid)))
        os.kill(pid, signal.SIGKILL)
        client.stdin.close()
        try:
            yield client
        finally:
            unmount.abort(mount)  # for what has not ended
            client.kill()
        asking.join()
    with suppress(ChildProcessError):
        processes.reap(pid)
    _restore(scene)


_WAITING = "folio_wait_writeback"
_DIRTY = """
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
pages = mmap.mmap(file, 0)
pages[0:1] = b"g"
print("dirty", flush=True)
sys.stdin.read()
pages.flush()
"""


def _ask_to_sync(mountpoint: bytes) -> None:
    with suppress(UserError):
        control_client.Client.at(mountpoint).sync()


def _stacks(pid: int) -> list[str]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found.append((task / "stack").read_text())
    return found


def _restore(scene: Scene) -> None:
    """Undo the change of the client; what it stored in the mapping was never acknowledged."""
    scene.clear()
    with suppress(FileNotFoundError):
        (scene.base / "u" / "f").unlink()


def _flushing(scene: Scene) -> list[str]:
    """The client ends by itself."""
    with _killed_flushing(scene) as client:
        return [] if _ends(client) else ["the client hangs"]


def _flushing_and_unmounted(scene: Scene) -> list[str]:
    """Where the daemon cannot avoid the hang, unmounting ends the wait of the client."""
    with _killed_flushing(scene, by_handle=False) as client:
        unmount.unmount(os.fsencode(scene.point))
        return [] if _ends(client) else ["the client hangs"]


def _flushing_and_mounted_over(scene: Scene) -> list[str]:
    """Mounting over it ends the wait as well."""
    with _killed_flushing(scene, by_handle=False) as client:
        found = works(scene)
        return found if _ends(client) else ["the client hangs", *found]


def _ends(client: subprocess.Popen[bytes]) -> bool:
    try:
        client.wait(LIMIT)
    except subprocess.TimeoutExpired:
        return False
    return True


def _aborted(scene: Scene) -> list[str]:
    pid = scene.start(scene.spec())
    unmount.abort(mounts.find(os.fsencode(scene.point)))
    code = processes.reap(pid)
    return [] if (code, scene.mounts()) == (MountError.exit_code, 0) else [f"exit {code}, {scene.mounts()} mounts"]


WAYS: dict[str, Way] = {
    "kill -9 at rest": _at_rest,
    "kill -9 with open files": _with_open_files,
    "kill -9 with a working directory in it": _with_working_directory,
    "kill -9 three times": _thrice,
    "kill -9, then unmounted": _then_unmounted,
    "kill -9, then asked": _listed,
    "stopped and unmounted": _stopped_and_unmounted,
    "stopped in the middle of a request": _stopped_in_the_middle,
    "stopped and mounted over": _stopped_and_mounted_over,
    "stopped and killed": _stopped_and_killed,
    "kill -9 while pages are flushed": _flushing,
    "the same without privilege, then unmounted": _flushing_and_unmounted,
    "the same without privilege, then mounted over": _flushing_and_mounted_over,
    "aborted": _aborted,
}


def _dies_mounting(moment: str, scene: Scene) -> list[str]:
    try:
        scene.start(scene.spec(), partial(dying.serve_dying, moment))
    except UserError as error:
        return [] if "ended with -9" in str(error) else [str(error)]
    return ["it lives"]


def _dies_unmounting(moment: str, scene: Scene) -> list[str]:
    pid = scene.start(scene.spec(), partial(dying.serve_dying, moment))
    (scene.point / "kept").write_bytes(b"kept")
    scene.clear()
    code = processes.reap(pid)
    kept = (scene.base / "u" / "kept").read_bytes()
    (scene.base / "u" / "kept").unlink()
    return [] if (code, kept) == (-signal.SIGKILL, b"kept") else [f"it ended with {code}, kept {kept!r}"]


EVERY: dict[str, Way] = {
    **WAYS,
    **{f"mounting: {moment}": partial(_dies_mounting, moment) for moment in dying.MOUNTING},
    **{f"unmounting: {moment}": partial(_dies_unmounting, moment) for moment in dying.UNMOUNTING},
}


@pytest.mark.campaign("T17")
@pytest.mark.parametrize("name", EVERY)
def test_the_next_mount_works(campaign: Campaign, fork_server: ForkServer, place: Path, name: str) -> None:
    for engine in engines.NAMES if campaign.full else (engines.current(),):
        scene = Scene(place / engine, fork_server, engine)
        try:
            wrong = EVERY[name](scene) + works(scene)
        finally:
            scene.clear()
        campaign.held(f"ways to die, engine {engine}", 1, [f"{name}: {each}" for each in wrong])


@pytest.mark.campaign("T17")
def test_killed_at_every_call_of_a_mount(campaign: Campaign, fork_server: ForkServer, place: Path) -> None:
    scene = Scene(place / "s", fork_server, engines.current())
    step = 1 if campaign.full else 5
    wrong: list[str] = []
    for number in itertools.count(0, step):
        try:
            pid = scene.start(scene.spec(), partial(dying.serve_until_call, number))
        except UserError:
            wrong += [f"call {number}: {each}" for each in works(scene)]
            continue
        scene.clear()
        processes.reap(pid)
        break
    campaign.held("changing calls of a mount", number // step, wrong)
