"""The command `archives`: import and export beside tar(1) with the same compression, and beside umoci, as commands.

Makes a tree of big files and one of small files, packs each with tar, gzip and zstd, and runs all programs in turns,
from the page cache. tar is followed by `sync -f`, for an import is durable when it returns. Prints medians in seconds,
elapsed and of processor time, and the ratio of each peer to overlayfs: above 1.0 overlayfs is faster. Processor time is
the figure to trust on a machine that is busy with other things.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from overlayfs_cli.benchmark.contenders import program

COMPRESSORS = {"none": None, "gzip": "gzip", "zstd": "zstd -T0"}
MIB = 1 << 20
Command = str  # a line of shell in which {out} is a directory for what it makes
Times = dict[str, dict[str, tuple[float, float]]]  # by task and program: seconds elapsed and of processor time


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.add_argument("--big", type=int, default=512, metavar="MIB", help="size of four big files together (512)")
    command.add_argument(
        "--small", type=int, default=10_000, metavar="N", help="small files, up to 4 KiB each (10,000)"
    )
    command.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each (3)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--place", type=Path, metavar="DIR", help="where the files are made (temporary directory)")
    command.set_defaults(act=show_archives)


def show_archives(given: argparse.Namespace) -> int:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="bench-archives-", dir=given.place) as directory:
        place = Path(directory)
        found = {
            "big": measure(place / "big", lambda tree: fill_big(tree, given.big), given.rounds),
            "small": measure(place / "small", lambda tree: fill_small(tree, given.small), given.rounds),
        }
    print(json.dumps(found, indent=2) if given.json else table(found))
    return 0


# --- trees: half of each file is random, half repeats, which compresses about as well as programs do -----------


def fill_big(tree: Path, mebibytes: int) -> None:
    """Make four big files."""
    source = random.Random(1)
    for number in range(4):
        with open(tree / f"file{number}", "wb") as stream:
            stream.writelines(_content(source, MIB) for _ in range(mebibytes // 4))


def fill_small(tree: Path, count: int) -> None:
    """Make small files in two levels of directories."""
    source = random.Random(2)
    for number in range(count):
        path = tree / f"d{number // 100 % 10}" / f"d{number // 100}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_content(source, source.randrange(4096)))


def _content(source: random.Random, size: int) -> bytes:
    noise = source.randbytes(size // 2)
    words = b"%d: the same words again and again\n" % source.randrange(9)
    return noise + (words * (size // len(words) + 1))[: size - len(noise)]


# --- programs ------------------------------------------------------------------------------------------------


def measure(base: Path, fill: Callable[[Path], None], rounds: int) -> Times:
    """Return the median times of each program, by task."""
    tree = base / "tree"
    tree.mkdir(parents=True)
    fill(tree)
    os.environ["OVERLAYFS_STORE"] = str(base / "store")
    _shell(f"{program('overlayfs')} import -q {tree} -t x")
    for name, compressor in COMPRESSORS.items():
        _shell(f"tar -C {tree} -cf {base}/{name}.tar" + (f" -I '{compressor}'" if compressor else "") + " .")
    _shell(f"{program('overlayfs')} export -q x -o {base}/layout --compression gzip")
    tasks = dict([*_imports(base), *_exports(base)])
    times: dict[str, dict[str, list[tuple[float, float]]]] = {
        task: {name: [] for name in programs} for task, programs in tasks.items()
    }
    for _ in range(rounds):
        for task, programs in tasks.items():
            for name, command in programs.items():
                times[task][name].append(_timed(command, base / "out"))
    return {task: {name: _median(each) for name, each in found.items()} for task, found in times.items()}


def _median(times: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(each[0] for each in times), statistics.median(each[1] for each in times)


def _imports(base: Path) -> Iterator[tuple[str, dict[str, Command]]]:
    ours = program("overlayfs")
    for kind in COMPRESSORS:
        programs = {
            "overlayfs": f"OVERLAYFS_STORE={{out}}/s {ours} import -q {base}/{kind}.tar -t x",
            "tar": f"mkdir {{out}}/t && tar -C {{out}}/t -xpf {base}/{kind}.tar && sync -f {{out}}",
        }
        if kind == "gzip" and shutil.which("umoci"):
            programs["umoci"] = f"umoci unpack --image {base}/layout:latest {{out}}/b && sync -f {{out}}"
        yield f"import {kind}", programs


def _exports(base: Path) -> Iterator[tuple[str, dict[str, Command]]]:
    ours = program("overlayfs")
    for kind, compressor in COMPRESSORS.items():
        words = f"-I '{compressor}'" if compressor else ""
        programs = {
            "overlayfs": f"{ours} export -q x -o {{out}}/x.tar --compression {kind}",
            "tar": f"tar -C {base}/tree {words} -cf {{out}}/x.tar . && sync -f {{out}}",
        }
        if kind == "gzip" and shutil.which("umoci"):
            programs["umoci"] = (
                "umoci init --layout {out}/l && umoci new --image {out}/l:x && "
                f"umoci insert --image {{out}}/l:x {base}/tree / && sync -f {{out}}"
            )
        yield f"export {kind}", programs


def _timed(command: Command, out: Path) -> tuple[float, float]:
    """Return seconds elapsed and of processor time."""
    out.mkdir()
    try:
        start, before = time.perf_counter(), _used()
        _shell(command.format(out=out))
        return time.perf_counter() - start, _used() - before
    finally:
        shutil.rmtree(out)


def _used() -> float:
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def _shell(line: str) -> None:
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{line}: exit {done.returncode}: {done.stderr}")


def table(found: dict[str, Times]) -> str:
    """Return both tables, of time elapsed and of processor time."""
    lines = []
    for part, what in enumerate(("elapsed", "processor time")):
        lines.append(f"{what:24}{'ours, s':>10}{'tar, s':>10}{'umoci, s':>10}{'tar/ours':>10}{'umoci/ours':>12}")
        for tree, tasks in found.items():
            for task, times in tasks.items():
                ours, tar = times["overlayfs"][part], times["tar"][part]
                umoci = times["umoci"][part] if "umoci" in times else float("nan")
                line = f"{tree + ', ' + task:24}{ours:10.2f}{tar:10.2f}{umoci:10.2f}"
                lines.append(line + f"{tar / ours:10.2f}{umoci / ours:12.2f}")
    return "\n".join(lines)
