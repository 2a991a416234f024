"""Runs workloads: all contenders in turn, so that a disturbance of the machine affects all of them.

A cold run: `before`, then the mount ends, the file system is written out, the kernel drops clean pages, names and
inodes (/proc/sys/vm/drop_caches 3), a new mount begins over the same upper, and the program that is timed runs once
elsewhere, so that it is in memory itself. A warm run follows `before` in the same mount. All prepared data
is written out before the clock starts; data that the workload leaves dirty is not waited for.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import content, disturbance
from bench.results import Result, Run
from bench.site import Site, drop_caches, run
from bench.workload import Trial, Workload, WrongError
from overlayfs_cli.benchmark.contenders import OURS, PLAIN, Contender, Mounted, RefusedError, Stack, over, program

FAILURES = (WrongError, RefusedError, RuntimeError, OSError, subprocess.SubprocessError)
Progress = Callable[[str], None]
Counts = dict[str, int]  # requests by kind


class Tree:
    """A contender's tree for one run: a mount with a fresh upper, or a plain directory."""

    def __init__(self, contender: Contender, workload: Workload, site: Site, scratch: Path) -> None:
        self._contender = contender
        self._place = site.layers(workload.content)
        self._plain = self._place / "whole"
        if contender.kind == PLAIN and workload.changes:
            self._plain = scratch / "plain"
            run("cp", "-a", "--reflink=never", self._place / "whole", self._plain)
        lowers = content.lowers(workload.content)
        self._stack = Stack(self._place, lowers, scratch / "upper", scratch / "work", scratch / "mnt")
        for path in (self._stack.upper, self._stack.work, self._stack.point):
            path.mkdir()
        self._open = ExitStack()
        self.mount = Mounted(self._plain, self._plain, None)

    def open(self) -> None:
        """Mount, unless it is the plain directory."""
        if self._contender.kind != PLAIN:
            self.mount = self._open.enter_context(over(self._contender, self._stack))

    def close(self) -> None:
        """Unmount."""
        self._open.close()


@contextmanager
def tree(contender: Contender, workload: Workload, site: Site) -> Iterator[Tree]:
    """Yield a tree that is removed afterwards, including its upper."""
    with tempfile.TemporaryDirectory(dir=site.layers(workload.content), prefix="run.") as scratch:
        made = Tree(contender, workload, site, Path(scratch))
        made.open()
        try:
            yield made
        finally:
            made.close()


def once(workload: Workload, contender: Contender, site: Site, count: bool = False) -> tuple[Run, Counts | None]:
    """Run a workload once; with `count` also ask our engine how many requests of each kind it took."""
    with tree(contender, workload, site) as place:
        trial = Trial(place.mount.root, site, contender)
        workload.before(trial)
        site.sync()
        if workload.cold:
            _forget(place, workload, site)
        count = count and contender.kind == OURS
        asked = requests(place.mount.root) if count else {}
        measured = _timed(workload, trial, place.mount.pid)
        counted = difference(asked, requests(place.mount.root)) if count else None
        workload.check(trial)
        return measured, counted


def _forget(place: Tree, workload: Workload, site: Site) -> None:
    place.close()
    site.sync()
    drop_caches()
    place.open()
    if workload.tool:
        subprocess.run(workload.tool, cwd=site.assets, capture_output=True, stdin=subprocess.DEVNULL, check=False)


def _timed(workload: Workload, trial: Trial, daemon: int | None) -> Run:
    before = disturbance.read(daemon)
    begun = time.perf_counter()
    workload.act(trial)
    elapsed = time.perf_counter() - begun
    after = disturbance.read(daemon)
    foreign = after.foreign - before.foreign
    value = elapsed if trial.value is None else trial.value
    return Run(value, after.daemon - before.daemon, foreign, disturbance.is_disturbed(foreign, elapsed))


def requests(root: Path) -> dict[str, int]:
    """Return how many requests of each kind the engine of a mount has answered."""
    done = subprocess.run([program("overlayfs"), "stats", "--json", str(root)], capture_output=True, check=True)
    counted = json.loads(done.stdout)["requests"]
    return {str(kind): int(number) for kind, number in counted.items()}


def difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Return what has been added, the largest number first."""
    added = {kind: number - before.get(kind, 0) for kind, number in after.items() if number != before.get(kind, 0)}
    return dict(sorted(added.items(), key=lambda item: -item[1]))


def takes_part(contender: Contender, workload: Workload) -> bool:
    """Return whether a contender can run a workload."""
    if workload.copies_up and not contender.copies_up:
        return False
    return not workload.only or contender.kind in workload.only


def measure(
    workload: Workload, contenders: Sequence[Contender], site: Site, runs: int, attempts: int, progress: Progress
) -> list[Result]:
    """Measure one workload with all contenders that can run it. The round before the first only counts and checks.

    A run that other processes disturb is repeated at once, up to `attempts` times in all; then the last one counts.
    """
    content.prepare(site, workload.content)
    able = [each for each in contenders if takes_part(each, workload)]
    found = {each.name: _empty(workload, each, site) for each in able}
    for turn in range(runs + 1):
        for contender in rotated(able, turn):
            progress(f"{site.kind}: {workload.name}: {contender.name}, {turn} of {runs}")
            result = found[contender.name]
            if not result.failed:
                _add(result, workload, contender, site, attempts if turn else 0)
    return [found[each.name] for each in able]


def _empty(workload: Workload, contender: Contender, site: Site) -> Result:
    return Result(
        workload.name, workload.group, site.kind, contender.name, contender.kind, workload.unit, workload.more_is_better
    )


def _add(result: Result, workload: Workload, contender: Contender, site: Site, attempts: int) -> None:
    try:
        if not attempts:
            _, result.requests = once(workload, contender, site, count=True)
            return
        for _ in range(attempts):
            made, _ = once(workload, contender, site)
            if not made.disturbed:
                break
        result.runs.append(made)
    except FAILURES as error:
        result.failed = str(error) or type(error).__name__


def rotated(contenders: Sequence[Contender], turn: int) -> list[Contender]:
    """Return the contenders in another order each turn, so that none always runs after the same one."""
    at = turn % len(contenders) if contenders else 0
    return [*contenders[at:], *contenders[:at]]
