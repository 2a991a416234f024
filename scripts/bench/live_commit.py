"""The command `commit`: a live commit beside `buildah commit` and `podman commit` of the same change.

First: a change of `--size` MiB in `--files` files is committed while four writers run. Measured are the time until the
layer can be used, the time until it is hashed, and the longest time that a write took meanwhile. The peers commit the
same change from a container's mount under the same writers; they block no writer, so their layer is not the state of
one moment.
Then: `--commits` commits in a row under four writers of sequence numbers. Afterwards every acknowledged number must be
there, in the mount and after the next mount, and the image of each commit must have those from before it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.site import run
from bench.writers import COUNT, Writers, wait_for, waits
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore
from overlayfs_cli.benchmark.contenders import program

PODMAN = ("--storage-driver", "overlay")
Figures = dict[str, float]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.add_argument("--size", type=int, default=1024, metavar="MIB", help="size of the change (1024)")
    command.add_argument("--files", type=int, default=10_000, metavar="N", help="number of its files (10,000)")
    command.add_argument("--rounds", type=int, default=5, metavar="N", help="runs of each (5)")
    command.add_argument("--commits", type=int, default=200, metavar="N", help="in a row; 0 leaves that part out (200)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--place", type=Path, metavar="DIR", help="where all is made (temporary directory)")
    command.set_defaults(act=show_commit)


def show_commit(given: argparse.Namespace) -> int:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="bench-commit-", dir=given.place) as directory:
        place = Path(directory)
        change = measure_change(place, given.size, given.files, given.rounds)
        row = measure_row(place / "row", given.commits) if given.commits else {}
    print(json.dumps({"change": change, "row": row}, indent=2) if given.json else table(change, row))
    return 0


# --- one large change ----------------------------------------------------------------------------------------


def measure_change(place: Path, mebibytes: int, files: int, rounds: int) -> dict[str, Figures]:
    """Return the figures of each tool; they take turns, so that all meet the same disturbances."""
    tools: dict[str, Callable[[Path, Path], Figures]] = {
        "overlayfs": _commit_ours,
        "buildah": _commit_buildah,
        "podman": _commit_podman,
    }
    change = place / "change"
    _fill(change, mebibytes, files)
    found: dict[str, list[Figures]] = {tool: [] for tool in tools if tool == "overlayfs" or shutil.which(tool)}
    for number in range(rounds):
        for tool, results in found.items():
            own = place / f"{tool}-{number}"
            own.mkdir()
            run("sync")
            results.append(tools[tool](own, change))
            print(f"{tool}: {results[-1]}", file=sys.stderr)
            shutil.rmtree(own)
    return {tool: _summary(results) for tool, results in found.items()}


def _summary(results: list[Figures]) -> Figures:
    """Return the medians of times, and the worst of the longest waits."""
    found: Figures = {}
    for key in results[0]:
        values = [each[key] for each in results]
        found[key] = max(values) if key.startswith("longest") else statistics.median(values)
    return found


def _fill(directory: Path, mebibytes: int, files: int) -> None:
    data = os.urandom((mebibytes << 20) // files)
    for number in range(files):
        inside = directory / f"d{number // 100:03}"
        inside.mkdir(parents=True, exist_ok=True)
        (inside / f"f{number:05}").write_bytes(data)


def _copy(change: Path, target: Path) -> None:
    run("cp", "-a", f"{change}/.", target)


def _base(place: Path) -> Path:
    tree = place / "base"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\n")
    return tree


def _timed(writers: Writers, commit: Callable[[], object]) -> Figures:
    """Commit under writers; return the time of the command, and how long writes took in it and before it."""
    before = time.monotonic()
    time.sleep(2)
    start = time.monotonic()
    commit()
    end = time.monotonic()
    time.sleep(0.2)
    steps = writers.steps()
    quiet, busy = waits(steps, before, start), waits(steps, start, end)
    return {
        "usable s": end - start,
        "p99 wait ms": _percentile(busy, 0.99) * 1e3,
        "longest wait ms": max(busy) * 1e3,
        "longest wait before ms": max(quiet) * 1e3,
    }


def _percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def _commit_ours(place: Path, change: Path) -> Figures:
    with _image_mount(place) as point:
        _copy(change, point)
        with Writers(point, place / "logs") as writers:
            layers: list[str] = []
            found = _timed(writers, lambda: layers.append(_commit(point, "-t", "site:2")["layer"]))
            start = time.monotonic()
            with LayerStore(os.fsencode(place / "store")) as store:
                wait_for(lambda: store.layers.find(layers[0]).record.state == "complete", 600)
            found["hashed s"] = found["usable s"] + time.monotonic() - start
    return found


def _commit(point: Path, *words: str) -> dict[str, Any]:
    return dict(json.loads(_output(program("overlayfs"), "commit", str(point), "--json", *words)))


@contextmanager
def _image_mount(place: Path, image: str = "site:1") -> Iterator[Path]:
    """Mount an image of the store in `place`, which is made the first time."""
    store, point = place / "store", place / "m"
    if not store.exists():
        point.mkdir()
        with LayerStore(os.fsencode(store)) as opened:
            layer = opened.commit_directory(os.fsencode(_base(place)))
            opened.images.put(ImageRecord(name="site:1", layers=(layer.id,), created=now()))
    run(program("overlayfs"), "mount", image, point, "--name", "w", "--store", store)
    try:
        yield point
    finally:
        run(program("overlayfs"), "umount", point)


def _output(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def _storage(place: Path) -> list[str]:
    return ["--root", str(place / "store"), "--runroot", str(place / "run"), *PODMAN]


def _commit_buildah(place: Path, change: Path) -> Figures:
    buildah = ["buildah", *_storage(place)]
    container = _output(*buildah, "from", "scratch")
    point = Path(_output(*buildah, "mount", container))
    try:
        _copy(_base(place), point)
        _copy(change, point)
        with Writers(point, place / "logs") as writers:
            return _timed(writers, lambda: run(*buildah, "commit", "-q", container, "localhost/site:2"))
    finally:
        run(*buildah, "umount", container)
        run(*buildah, "rm", container)
        _release(place)


def _commit_podman(place: Path, change: Path) -> Figures:
    podman = ["podman", *_storage(place)]
    run("tar", "-C", _base(place), "-cf", place / "base.tar", ".")
    run(*podman, "import", "-q", place / "base.tar", "localhost/site:1")
    run(*podman, "create", "--network=none", "--name", "c", "localhost/site:1", "/bin/true")
    point = Path(_output(*podman, "mount", "c"))
    try:
        _copy(change, point)
        with Writers(point, place / "logs") as writers:
            return _timed(writers, lambda: run(*podman, "commit", "-q", "c", "localhost/site:2"))
    finally:
        run(*podman, "umount", "c")
        run(*podman, "rm", "c")
        _release(place)


def _release(place: Path) -> None:
    """Unmount the bind mount that the storage of containers leaves on its own directory."""
    subprocess.run(["umount", str(place / "store" / "overlay")], check=False, stderr=subprocess.DEVNULL)


# --- many commits in a row -----------------------------------------------------------------------------------


def measure_row(place: Path, count: int) -> Figures:
    """Commit many times under four writers; return the waits. The program ends if a write is lost."""
    place.mkdir()
    spans: list[tuple[float, float]] = []
    quiet: list[tuple[float, float]] = []  # as long as the previous commit, and without one
    before: list[list[int]] = []
    gate: list[float] = []
    with _image_mount(place) as point, Writers(point, place / "logs") as writers:
        for number in range(count):
            wait_for(writers.has_progressed)
            quiet.append(_pause(spans))
            before.append(writers.acknowledged())
            start = time.monotonic()
            gate.append(_commit(point, "-t", f"site:c{number}", "--allow-empty")["held"] * 1e3)
            spans.append((start, time.monotonic()))
    # The writers end before the mount: all acknowledged writes have been made, and no more follow.
    steps, acknowledged = writers.steps(), writers.acknowledged()
    lost = _check_images(place, before) + _check_mount(place, f"site:c{count - 1}", acknowledged)
    if lost:
        raise SystemExit("lost: " + "; ".join(lost))
    longest, usual = (
        [max(waits([each], *span), default=0.0) * 1e3 for span in chosen for each in steps] for chosen in (spans, quiet)
    )
    return {
        "commits": count,
        "acknowledged writes": sum(acknowledged),
        "lost": 0,
        "usable median s": statistics.median(end - start for start, end in spans),
        "gate closed p99 ms": _percentile(gate, 0.99),
        "gate closed longest ms": max(gate),
        "longest wait in a commit, median ms": statistics.median(longest),
        "longest wait in a commit, p99 ms": _percentile(longest, 0.99),
        "longest wait of all ms": max(longest),
        "longest wait in as much time without a commit, median ms": statistics.median(usual),
        "longest wait in as much time without a commit, p99 ms": _percentile(usual, 0.99),
    }


def _pause(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """Sleep as long as the last commit took; return when that began and ended."""
    start = time.monotonic()
    time.sleep(spans[-1][1] - spans[-1][0] if spans else 0.1)
    return start, time.monotonic()


def _check_mount(place: Path, image: str, acknowledged: list[int]) -> list[str]:
    """Mount again; return a sentence for each writer whose acknowledged numbers are not all there."""
    with _image_mount(place, image) as point:
        return [
            f"w{number} has {found} of {count}"
            for number, count in enumerate(acknowledged)
            if not count <= (found := _numbers(sorted((point / f"w{number}").iterdir()))) <= count + 1
        ]


def _numbers(files: list[Path]) -> int:
    """Return how many numbers a writer's files have, from 0 on; -1 if there is a gap."""
    expected = 0
    for file in files:
        for line in file.read_bytes().splitlines():
            if int(line) != expected:
                return -1
            expected += 1
    return expected


def _check_images(place: Path, before: list[list[int]]) -> list[str]:
    """Return a sentence for each image that lacks a number acknowledged before its commit was requested."""
    lost: list[str] = []
    with LayerStore(os.fsencode(place / "store")) as store:
        newest: list[dict[str, Path]] = [{} for _ in range(COUNT)]
        for number, counts in enumerate(before):
            top = store.stack_of(f"site:c{number}")[0]
            for writer, least in enumerate(counts):
                inside = Path(os.fsdecode(top.tree_path)) / f"w{writer}"
                newest[writer].update({each.name: each for each in inside.iterdir()} if inside.exists() else {})
                found = _numbers([newest[writer][name] for name in sorted(newest[writer])])
                if found < least:
                    lost.append(f"site:c{number} has {found} of w{writer}, {least} were acknowledged")
    return lost


# --- the table -----------------------------------------------------------------------------------------------


def table(change: dict[str, Figures], row: Figures) -> str:
    """Return the figures in Markdown."""
    columns = ("usable s", "hashed s", "p99 wait ms", "longest wait ms", "longest wait before ms")
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for tool, results in change.items():
        cells = (f"{results[name]:.3g}" if name in results else "as usable" for name in columns)
        lines.append(f"| {tool} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}: {value:.4g}" for name, value in row.items())]
    return "\n".join(lines)
