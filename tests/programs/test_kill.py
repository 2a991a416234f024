"""kill -9 at any moment: of a commit, of a daemon at rest, under load, and while it commits.

The next mount of the same stack needs no manual step, and no file that was there is damaged.
"""

import itertools
import os
import random
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from overlayfs import sysio
from tests.programs.conftest import Bench, sh
from tests.support import processes
from tests.support.drivers import Stack, driver_class
from tests.support.drivers.mounts import COMMAND
from tests.support.dump import Dump, dump, same
from tests.support.requirements import need_root
from tests.support.spec import Dir, File, Link, Special, Symlink, Whiteout
from tests.support.spec import Tree as Spec

TOP: Spec = {
    "d": {"merged": b"of the top", "gone": Whiteout(), "deep": {"x": b"x"}},
    "file": File(b"content" * 3000, mode=0o640, uid=1000, xattrs={"user.mark": b"1"}),
}
LOW: Spec = {
    "d": {"merged": b"of the low", "gone": b"hidden", "kept": b"kept", "deep": {"y": b"y"}},
    "file": b"hidden",
    "one": b"linked" * 100,
    "two": Link("one"),
    "link": Symlink("d/kept"),
    "fifo": Special("p"),
    "empty": {},
    "whole": Dir({"a": b"a", "b": {"c": b"c"}}, mode=0o2750, gid=5),
}


def die_at(number: int, act: Callable[[Callable[[], None]], object]) -> bool:
    """Act in a child that is killed at its `number`-th changing system call, just before the call is made.

    `act` is called with the function that begins the count. Return False when it completed before.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act(lambda: count_down(number))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the child failed with {code}"
    return code != 0


def count_down(left: int) -> None:
    """From now on count the changing system calls of this process, and kill it just before call number `left` + 1."""
    calls = itertools.count()

    def count(_call: str) -> None:
        if next(calls) == left:
            os.kill(os.getpid(), signal.SIGKILL)

    sysio.fault_hook = count


def shown(stack: Stack) -> Dump:
    """What the stack shows when it is used again, which must need no manual step."""
    tree = driver_class("fs")(stack)
    try:
        return dump(tree)
    finally:
        tree.close()


def changed(place: Path) -> Stack:
    """A stack whose upper has everything that a commit treats differently."""
    stack = Stack(place / "s", [TOP, LOW], {})
    tree = driver_class("fs")(stack)
    tree.chmod("file", 0o600)
    tree.write("one", b"L")
    tree.rename("d", "moved")
    tree.unlink("fifo")
    tree.create("new", b"n" * 10_000)
    tree.link("new", "whole/new")
    tree.setxattr("whole", "user.mark", b"1")
    tree.close()
    return stack


def commit(stack: Stack, layer: Path, begun: Callable[[], None] = lambda: None) -> None:
    """Commit the upper that is not mounted, in this process."""
    begun()
    from overlayfs.fs.config import StackConfig
    from overlayfs.store.copy_upper import commit_unmounted

    assert stack.upper is not None and stack.work is not None
    lower = tuple(os.fsencode(path) for path in stack.lower)
    commit_unmounted(StackConfig(lower, os.fsencode(stack.upper), os.fsencode(stack.work)), os.fsencode(layer))


def committed(stack: Stack, layer: Path, base: Path) -> Dump:
    """What the committed layer shows over the lower layers."""
    view = Stack(base, [], None)
    view.lower = [layer, *stack.lower]
    try:
        return shown(view)
    finally:
        view.remove()


def test_a_commit_killed_at_any_moment(place: Path) -> None:
    """There is no layer, or a complete one; what a dead commit staged is removed by the next."""
    need_root()
    stack = changed(place)
    wanted = shown(stack)
    layers = place / "layers"
    layers.mkdir()
    layer = layers / "new"
    killed, whole = 0, 0
    for moment in itertools.count():
        died = die_at(moment, lambda begin: commit(stack, layer, begin))
        killed += died
        if layer.exists():
            whole += 1
            same(wanted, committed(stack, layer, place / "view"))
            assert os.listdir(layers) == ["new"]
            sh("rm", "-r", layer)
        if not died:
            break
    assert killed > 50
    assert whole >= 2, "it was never killed between the rename and its end"
    same(wanted, shown(stack))
    stack.check()


def test_leftovers_of_a_killed_commit_vanish_with_the_next(place: Path) -> None:
    need_root()
    stack = changed(place)
    wanted = shown(stack)
    layers = place / "layers"
    layers.mkdir()
    for moment in (30, 40):
        assert die_at(moment, lambda begin: commit(stack, layers / "new", begin))
        assert len(os.listdir(layers)) == 1 and not (layers / "new").exists()
    commit(stack, layers / "new")
    assert os.listdir(layers) == ["new"]
    same(wanted, committed(stack, layers / "new", place / "view"))


def kill(bench: Bench) -> None:
    """kill -9 the daemon of the mount."""
    assert bench.tree is not None
    (pid,) = bench.tree.daemons
    os.kill(pid, signal.SIGKILL)
    processes.reap(pid)


def again(bench: Bench) -> None:
    """Mount the same stack at the same place, with no step between."""
    assert bench.tree is not None
    bench.tree.raw.close()
    bench.tree.reopen()


def test_killed_at_rest(bench: Bench) -> None:
    (bench.low / "d").mkdir()
    for number in range(50):
        (bench.low / f"d/old{number}").write_bytes(b"o" * 5000)
    point = bench.mount()
    sh("sh", "-c", "echo more >>d/old1; rm d/old2; mv d/old3 d/old4; mkdir new; mv d new/d; echo n >new/n", cwd=point)
    names = sorted(os.listdir(point / "new/d"))
    for _ in range(3):
        kill(bench)
        again(bench)
    assert sorted(os.listdir(point / "new/d")) == names
    assert (point / "new/d/old1").read_bytes() == b"o" * 5000 + b"more\n"
    assert (point / "new/n").read_text() == "n\n"
    assert not (point / "d").exists()


LOAD = """
import os, sys
seed, = map(int, sys.argv[1:])
for turn in range(10000):
    name = f"w{seed}.{turn}"
    with open(name + ".new", "wb") as file:
        file.write(name.encode() * 2000)
        file.flush()
        os.fsync(file.fileno())
    os.rename(name + ".new", name)
    with open(f"d/old{turn % 40}", "r+b") as file:
        file.write(b"N")
    os.rename(f"d/old{turn % 40}", f"d/old{turn % 40}")
    print(name, flush=True)
"""


def test_killed_under_load(bench: Bench) -> None:
    """Each file that a program has finished is there; each old one has its old content, except for what was written."""
    (bench.low / "d").mkdir()
    for number in range(40):
        (bench.low / f"d/old{number}").write_bytes(b"o" * 100_000)
    for number in range(40):
        (bench.top / f"kept{number}").write_bytes(b"k" * 1000)
    point = bench.mount()
    finished: list[str] = []
    for turn in range(3):
        finished += _load_until_killed(bench, turn, 8 + 5 * turn)
        again(bench)
        for name in finished:
            assert (point / name).read_bytes() == name.encode() * 2000
        for number in range(40):
            assert (point / f"d/old{number}").read_bytes() in (b"o" * 100_000, b"N" + b"o" * 99_999)
            assert (point / f"kept{number}").read_bytes() == b"k" * 1000
    assert len(finished) > 30


def _load_until_killed(bench: Bench, turn: int, files: int) -> list[str]:
    """Two programs write; when one has finished some files, the daemon is killed. What was finished is returned."""
    workers = [
        subprocess.Popen(
            ["python3", "-c", LOAD, str(10 * turn + number)],
            cwd=bench.point, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    assert workers[0].stdout is not None
    finished = [workers[0].stdout.readline().strip() for _ in range(files)]
    kill(bench)
    for worker in workers:
        out, _ = worker.communicate(timeout=30)
        finished += out.split()
    assert "" not in finished
    return finished


def test_a_commit_of_a_mount_killed_at_random_moments(bench: Bench, place: Path) -> None:
    """The daemon dies while it commits: the stack mounts again unharmed, and no partial layer is ever visible."""
    for number in range(150):
        (bench.low / f"f{number}").write_bytes(b"%d" % number * 3000)
    point = bench.mount()
    sh("sh", "-c", "for n in $(seq 0 2 149); do echo more >>f$n; done; mkdir d; mv f1* d; rm f2*", cwd=point)
    picture = dump(bench.tree)  # type: ignore[arg-type]
    layers = place / "layers"
    layers.mkdir()
    chance = random.Random(2)
    for _ in range(6):
        _commit_and_kill(bench, layers, chance.randrange(100))
        again(bench)
        same(picture, dump(bench.tree))  # type: ignore[arg-type]
        if (layers / "new").exists():
            sh("rm", "-r", layers / "new")
    sh(COMMAND, "commit", point, "--to", layers / "new")
    assert os.listdir(layers) == ["new"]


def _commit_and_kill(bench: Bench, layers: Path, entries: int) -> None:
    """Kill the daemon when its staging directory holds so many entries, or the commit is over."""
    committing = subprocess.Popen([COMMAND, "commit", bench.point, "--to", layers / "new"], stderr=subprocess.PIPE)
    while committing.poll() is None and _staged(layers) < entries:
        pass
    kill(bench)
    committing.communicate(timeout=30)
    assert committing.returncode == (0 if (layers / "new").exists() and committing.returncode == 0 else 1)


def _staged(layers: Path) -> int:
    with suppress(FileNotFoundError):
        return sum(len(os.listdir(path)) for path in layers.iterdir())
    return -1
