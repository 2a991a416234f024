"""The command `verify`: `overlayfs verify` beside `xxhsum -H2` and a plain read (`cat`) of the same files.

Makes a store with a layer of big files, then one of small files, and reads each with all three in turns: with the files
in the page cache and, as root, after it was dropped. Prints the medians of their throughput and the ratios; above 1.0
verification is faster than the tool. `xxhsum` and `cat` get all files at once from xargs(1).
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.site import drop_caches
from overlayfs.store.manifest import Manifest
from overlayfs.store.store import LayerStore
from overlayfs.store.verify import verify

MIB = 1 << 20
SMALL = 16 * 1024  # bytes of a small file


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.add_argument("--big", type=int, default=1024, metavar="MIB", help="size of four big files together (1024)")
    command.add_argument("--small", type=int, default=20_000, metavar="N", help="number of small files (20,000)")
    command.add_argument("--rounds", type=int, default=5, metavar="N", help="runs of each (5)")
    command.add_argument("--threads", type=int, metavar="N", help="threads of the verification (its own choice)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--place", type=Path, metavar="DIR", help="where the files are made (temporary directory)")
    command.set_defaults(act=show_verification)


def show_verification(given: argparse.Namespace) -> int:
    """Measure and print."""
    if shutil.which("xxhsum") is None:
        raise SystemExit("scripts/bench: xxhsum is not installed (package xxhash)")
    trees = {"big": [given.big * MIB // 4] * 4, "small": [SMALL] * given.small}
    with tempfile.TemporaryDirectory(prefix="bench-verify-", dir=given.place) as place:
        found = {name: measure(Path(place) / name, sizes, given.rounds, given.threads) for name, sizes in trees.items()}
    if given.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, states in found.items():
        for state, numbers in states.items():
            print(f"{name:6}{state:6}" + "  ".join(f"{word} {number}" for word, number in numbers.items()))
    return 0


def measure(place: Path, sizes: list[int], rounds: int, threads: int | None) -> dict[str, dict[str, float]]:
    """Return MiB/s of each reader, warm and cold, and the ratios of the verification to the others."""
    place.mkdir()
    with LayerStore(os.fsencode(place / "store")) as store:
        with store.layers.stage() as staged:
            _fill(Path(os.fsdecode(staged.tree_path)), sizes)
            with Manifest.build(staged.tree_fd) as manifest:
                layer = staged.publish(manifest=manifest)
        tree = Path(os.fsdecode(layer.tree_path))
        readers: dict[str, Callable[[], object]] = {
            "verify": lambda: _verify(store, threads),
            "xxhsum": lambda: _read(tree, "xxhsum", "-H2"),
            "cat": lambda: _read(tree, "cat"),
        }
        return {
            state: _ratios(sum(sizes), _timed(readers, rounds, cold=state == "cold"))
            for state in ("warm", "cold")
            if state == "warm" or os.geteuid() == 0
        }


def _fill(tree: Path, sizes: list[int]) -> None:
    source = random.Random(1)
    for number, size in enumerate(sizes):
        directory = tree / f"d{number // 200:04}"
        directory.mkdir(exist_ok=True)
        with open(directory / f"f{number:06}", "wb") as stream:
            stream.writelines(source.randbytes(min(size, MIB)) for _ in range(0, size, MIB))


def _verify(store: LayerStore, threads: int | None) -> None:
    if verify(store.directory, None, threads).problems:
        raise SystemExit("the store is damaged")


def _read(tree: Path, *command: str) -> None:
    finder = subprocess.Popen(["find", ".", "-type", "f", "-print0"], cwd=tree, stdout=subprocess.PIPE)
    subprocess.run(["xargs", "-0", *command], cwd=tree, stdin=finder.stdout, stdout=subprocess.DEVNULL, check=True)
    finder.wait()


def _timed(readers: dict[str, Callable[[], object]], rounds: int, cold: bool) -> dict[str, float]:
    """Return the median of each reader's seconds; they take turns, so that all meet the same disturbances."""
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, read in readers.items():
            if cold:
                os.sync()
                drop_caches()
            start = time.perf_counter()
            read()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def _ratios(size: int, seconds: dict[str, float]) -> dict[str, float]:
    speeds = {f"{name} MiB/s": float(round(size / MIB / each)) for name, each in seconds.items()}
    return {
        **speeds,
        "verify to xxhsum": round(seconds["xxhsum"] / seconds["verify"], 2),
        "verify to cat": round(seconds["cat"] / seconds["verify"], 2),
    }
