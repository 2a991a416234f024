"""Measurements that are not workloads in a tree: mounting itself, memory, and copy-up file by file."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bench import content, disturbance
from bench.results import Result, Run
from bench.runner import FAILURES, Progress, rotated
from bench.site import Site, drop_caches
from bench.workload import seconds_of
from overlayfs_cli.benchmark import contenders, copyup, copyup_report
from overlayfs_cli.benchmark.contenders import OURS, PLAIN, Contender, Stack

STARTS = 20  # of each contender; a start is short, so many are needed
LAYERS = (3, 500)
PAGE = os.sysconf("SC_PAGE_SIZE")
IDLE = 0.3  # seconds in which a daemon uses no CPU before its memory is read

Measure = Callable[[Site, Sequence[Contender], int, Progress], list[Result]]


@dataclass(frozen=True)
class Special:
    """A measurement with its own procedure. `kinds`: the file systems for which it is meaningful."""

    name: str
    group: str
    measure: Measure
    kinds: tuple[str, ...] = ("ext4", "tmpfs")


def result(name: str, group: str, site: Site, contender: Contender, unit: str) -> Result:
    """Return a result without runs."""
    return Result(name, group, site.kind, contender.name, contender.kind, unit, False)


# Start-up.


def start_up(site: Site, candidates: Sequence[Contender], runs: int, progress: Progress) -> list[Result]:
    """Measure the time until the mount command returns, and until a file has answered; with few and many layers."""
    able = [as_engines_call(each) for each in candidates if each.kind != PLAIN]
    found: list[Result] = []
    for layers in LAYERS:
        name = f"{content.DEPTH}{layers}"
        content.prepare(site, name)
        ready = {each.name: result(f"mount, {layers} layers", "start-up", site, each, "ms") for each in able}
        first = {each.name: result(f"first answer, {layers} layers", "start-up", site, each, "ms") for each in able}
        for turn in range(max(runs, STARTS if layers < 10 else runs) + 1):
            for each in rotated(able, turn):
                progress(f"{site.kind}: mount, {layers} layers: {each.name}, {turn}")
                _start_once(site, name, each, ready[each.name], first[each.name], counted=turn > 0)
        found += [*ready.values(), *first.values()]
    return found


def _start_once(site: Site, name: str, each: Contender, ready: Result, first: Result, counted: bool) -> None:
    if ready.failed:
        return
    try:
        with fresh_stack(site, name) as stack:
            before = disturbance.read(None)
            took = _started(each, stack)
        foreign = disturbance.read(None).foreign - before.foreign
    except FAILURES as error:
        ready.failed = first.failed = str(error) or type(error).__name__
        return
    if counted:
        for kept, seconds in zip((ready, first), took, strict=True):
            kept.runs.append(Run(seconds * 1000, 0.0, foreign, disturbance.is_disturbed(foreign, seconds)))


def _started(each: Contender, stack: Stack) -> tuple[float, float]:
    """Return the seconds until the command has returned, and until a file of the lowest layer was seen."""
    begun = time.perf_counter()
    contenders.start(each, stack)
    ready = time.perf_counter() - begun
    try:
        os.stat(stack.point / "shared/00000")
        answered = time.perf_counter() - begun
    finally:
        contenders.unmount(stack.point, contenders.server(stack.point) if each.is_fuse else None)
    return ready, answered


@contextmanager
def fresh_stack(site: Site, name: str) -> Iterator[Stack]:
    """Yield a stack over the layers of a content, with an empty upper."""
    with tempfile.TemporaryDirectory(dir=site.layers(name), prefix="run.") as directory:
        scratch = Path(directory)
        stack = Stack(site.layers(name), content.lowers(name), scratch / "upper", scratch / "work", scratch / "mnt")
        for path in (stack.upper, stack.work, stack.point):
            path.mkdir()
        yield stack


def anatomy(site: Site, each: Contender) -> dict[str, float]:
    """Return the parts of our time until ready in milliseconds: the fastest of several, so that parts add up.

    The parts: the interpreter; trio and its imports; our own modules and their other imports; the rest, which is fork,
    opening the stack, mount(2), handshake, record and socket.
    """
    each = as_engines_call(each)
    content.prepare(site, f"{content.DEPTH}3")
    with fresh_stack(site, f"{content.DEPTH}3") as stack:
        total = min(_started(each, stack)[0] for _ in range(10))
        own = _own_modules(each, stack)
    python, trio, all_of_them = (_import_time(words) for words in ("", "import trio", f"import trio, {', '.join(own)}"))
    parts = {
        "Python": python,
        "trio": trio - python,
        "our modules": all_of_them - trio,
        "the work": total - all_of_them,
        "total": total,
    }
    return {name: round(seconds * 1000, 1) for name, seconds in parts.items()}


def as_engines_call(each: Contender) -> Contender:
    """Return our contender as container engines start it: by `overlayfs-mount`, which does not import click."""
    if each.kind != OURS:
        return each
    options = each.command[each.command.index("-o") + 1]
    return replace(each, command=(contenders.program("overlayfs-mount"), "-o", options, "MOUNTPOINT"))


def _import_time(statement: str) -> float:
    code = f"import gc; gc.disable(); {statement}"
    return min(seconds_of(lambda: subprocess.run([sys.executable, "-c", code], check=True)) for _ in range(10))


def _own_modules(each: Contender, stack: Stack) -> list[str]:
    """Return our modules that the two processes of a start load until the mount is ready."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    words = stack.words(each.command)
    done = subprocess.run(words, cwd=stack.base, env=environment, capture_output=True, text=True, check=True)
    contenders.unmount(stack.point, contenders.server(stack.point))
    names = (line.rpartition("|")[2].strip() for line in done.stderr.splitlines())
    return sorted({name for name in names if name.startswith("overlayfs")})


# Memory.


def memory(site: Site, candidates: Sequence[Contender], runs: int, progress: Progress) -> list[Result]:
    """Measure the memory of each daemon: at the start, with every node cached, after the kernel has forgotten them."""
    content.prepare(site, "nodes")
    found: list[Result] = []
    for each in candidates:
        if each.is_fuse:
            progress(f"{site.kind}: memory: {each.name}")
            found += _memory_of(site, each)
    return found


def _memory_of(site: Site, each: Contender) -> list[Result]:
    nodes = f"{site.sizes.nodes:,} nodes"
    steps = ("memory at the start", f"memory with {nodes}", f"memory after {nodes} were forgotten")
    kept = [result(step, "scale", site, each, "MiB") for step in steps]
    try:
        with fresh_stack(site, "nodes") as stack, contenders.over(each, stack) as mount:
            assert mount.pid is not None
            kept[0].runs.append(Run(_rss(mount.pid)))
            _walk(mount.root, site.sizes.nodes)
            kept[1].runs.append(Run(_rss(mount.pid)))
            drop_caches()
            _settle(mount.pid)
            kept[2].runs.append(Run(_rss(mount.pid)))
    except FAILURES as error:
        for each_result in kept:
            each_result.failed = str(error) or type(error).__name__
    return kept


def _walk(root: Path, nodes: int) -> None:
    """Stat every file, so that the kernel caches them all, unless it runs out of memory."""
    done = subprocess.run(["find", ".", "-type", "f", "-size", "-1"], cwd=root, capture_output=True, check=True)
    found = done.stdout.count(b"\n")
    if found != nodes:
        raise RuntimeError(f"{found} files were found instead of {nodes}")


def _rss(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / (1 << 20)


def _settle(pid: int) -> None:
    """Return when a daemon is idle: after it has processed a million messages."""
    before = -1.0
    while (now := disturbance.read(pid).daemon) != before:
        before = now
        time.sleep(IDLE)


# Copy-up.


def copy_up(site: Site, candidates: Sequence[Contender], runs: int, progress: Progress) -> list[Result]:
    """Measure the first change to files of all sizes; the values are milliseconds of single changes."""
    limit = min(site.sizes.largest, 100 << 20 if site.kind == "tmpfs" else site.sizes.largest)
    wanted = copyup.cases(limit, site.sizes.touched)
    able = [each for each in candidates if each.copies_up]
    base = site.root / "copy-up"
    base.mkdir()
    copyup.fill(base, wanted)

    def show(line: str) -> None:
        progress(f"{site.kind}: copy-up: {line}")

    costs = copyup.measure(able, wanted, base, max(1, runs // 2), show, exclusive=True)
    by_name = {each.name: each for each in able}
    return [_copy_up_result(cost, by_name[cost.contender], site) for cost in costs]


def _copy_up_result(cost: copyup.Cost, each: Contender, site: Site) -> Result:
    name = f"{cost.case.operation}: {copyup_report.label(cost.case)}"
    made = result(name, "copy-up", site, each, "ms")
    made.failed = cost.failed
    made.runs = [Run(seconds * 1000) for seconds in cost.seconds]
    made.extra = {"stored_bytes": cost.bytes_stored, "amplification": cost.amplification}
    return made


ALL = (
    Special("copy-up", "copy-up", copy_up, ("ext4", "tmpfs", "xfs", "btrfs")),
    Special("mount", "start-up", start_up),
    Special("memory", "scale", memory, ("tmpfs",)),
)
