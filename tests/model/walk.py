"""Random lives of mounts beside the model, fast enough for a million steps: `python -m tests.model.walk --engine NAME`.

A life is a mount of random layers and some hundred steps of steps.py. What a step touches is compared after it, the
whole tree now and then. A life follows from the seed and its number. One that differs from the model is cut down to
the steps that matter, and these are printed; `--replay FILE` takes what was printed.
"""

import argparse
import ast
import faulthandler
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.model.minimise import smallest
from tests.model.reference import Item, Model, parts
from tests.model.steps import KINDS, Domain, Life, a_file, a_path, layers
from tests.support import engines
from tests.support.drivers import Stack
from tests.support.drivers.forked import ForkedImage, ForkedMount, load, unhashed
from tests.support.spec import Dir, File, flatten

Step = tuple[str, dict[str, Any]]
Source = Callable[["Walk"], Iterator[Step]]

STEPS = 500  # of a life
WHOLE = 50  # steps between two looks at the whole tree
KNOWN = {a_path: 0.6, a_file: 0.95}  # how often a path is one that is there
HANGS = 600.0  # seconds for one life, and for cutting it down
RARE = {"remount": 0.15, "commit": 0.1, "commit_live": 0.5, "look_at_everything": 0.2}  # weights; other kinds have 1
OPTIONS: tuple[dict[str, str | None], ...] = (
    {}, {}, {"timeout": "0"}, {"writeback": "1"}, {"metacopy": "off"}, {"redirect_dir": "off"}, {"volatile": None},
)  # fmt: skip
EMPTY = Dir()
NAMES = tuple(KINDS)
WEIGHTS = tuple(itertools.accumulate(RARE.get(name, 1.0) for name in NAMES))


@dataclass(frozen=True)
class LifeKey:
    """Identifies a life: everything random in it follows from these values."""

    engine: str
    seed: int
    number: int


@dataclass
class Walked:
    """Steps done, by kind, and a text for each life that differed from the model."""

    done: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The number of steps done."""
        return self.done.total()

    def summary(self) -> dict[str, object]:
        """The figures for a record."""
        lives = {"lives": self.lives, "remounts": self.done["remount"]}
        commits = self.done["commit"] + self.done["commit_live"]
        return {"steps": self.steps, **lives, "commits": commits, "differences": len(self.differences)}

    def add(self, other: "Walked") -> None:
        """Add the counts of another result."""
        self.done += other.done
        self.lives += other.lives
        self.differences += other.differences


# --- one life ----------------------------------------------------------------------------------------------


class Walk:
    """A life under way."""

    def __init__(self, key: LifeKey, place: Path) -> None:
        self.random = random.Random(f"{key.seed}/{key.number}")
        self.place = Path(tempfile.mkdtemp(prefix="life-", dir=place))
        self.life = Life()
        self.options = {"engine": key.engine, **self.random.choice(OPTIONS)}
        self.layers = layers(self.random.choice)
        if "metacopy" in self.options:
            self.layers[-1] = {**self.layers[-1], "y": File(b"no twin")}  # link counts are not kept (deviations.md)
        self.kind = self.random.choice((ForkedMount, ForkedImage))
        self.life.unseen_writers = key.engine == engines.KERNEL and self.kind is ForkedMount
        self.tree: ForkedMount | None = None

    def begin(self) -> None:
        """Mount."""
        upper = None if self.kind is ForkedImage else EMPTY
        self.tree = self.kind(Stack(self.place / "s", list(self.layers), upper), self.options)
        self.life.begin(self.tree, Model(flatten(self.layers)))

    def drawn(self, count: int) -> Iterator[Step]:
        """Yield `count` steps; each is drawn after the one before was done."""
        while count:
            step = self._draw()
            if self.allows(step):
                yield step
                count -= 1

    def _draw(self) -> Step:
        (name,) = self.random.choices(NAMES, cum_weights=WEIGHTS)
        return name, {argument: self._argument(domain) for argument, domain in KINDS[name].domains.items()}

    def _argument(self, domain: Domain) -> Any:
        known: list[str] = []
        if domain in (a_path, a_file) and self.random.random() < KNOWN[domain]:
            known = [path for path, _ in self.life.model.paths() if domain is a_path or self.life.regular(path)]
        return self.random.choice(known) if known else domain(self.random.choice)

    def allows(self, step: Step) -> bool:
        """Whether the step can be done now, and the options support what it checks."""
        if step[0] == "link" and "metacopy" in self.options:  # link counts are not kept over commits (deviations.md)
            return False
        return KINDS[step[0]].possible(self.life) and not any(
            _follows(self.life.model, path) for path in _touched(step)
        )

    def do(self, step: Step) -> None:
        """Do a step and look at what it touched."""
        name, arguments = step
        KINDS[name].act(self.life, **arguments)
        links = self.life.link_counts()
        for path in _touched(step):
            self.life.look_at(path, links)
        self.life.check_open_files(links)

    def clear(self) -> None:
        """Remove what is left, however the life has ended."""
        if self.tree is not None:
            self.tree.kill()
        shutil.rmtree(self.place, ignore_errors=True)  # `walking` fails if something is left after a hang


def _touched(step: Step) -> list[str]:
    return [step[1][each] for each in ("path", "old", "new") if each in step[1]]


def _follows(model: Model, path: str) -> bool:
    """Whether the kernel would follow a symlink in the path, and perform the step elsewhere."""
    above = parts(path)[:-1]
    with suppress(OSError):
        for count in range(1, len(above) + 1):
            thing = model.find("/".join(above[:count]))
            if isinstance(thing, Item):
                return thing.kind == "symlink"
    return False


def live(key: LifeKey, place: Path, source: Source) -> tuple[list[Step], str | None]:
    """Run one life; return the steps that were done, and the failure of the last one, or None."""
    walk, done = Walk(key, place), list[Step]()
    try:
        walk.begin()
        for step in source(walk):
            if walk.allows(step):
                done.append(step)
                walk.do(step)
                if not len(done) % WHOLE:
                    walk.life.check_tree()
        walk.life.end()
    except Exception:
        return done, f"{walk.kind.__name__}, {walk.options}\n{traceback.format_exc(limit=-3)}"
    finally:
        walk.clear()
    return done, None


# --- many lives --------------------------------------------------------------------------------------------


def walk(engine: str, seed: int, numbers: Iterable[int], count: int, place: Path) -> Walked:
    """Run lives of these numbers until `count` steps are done."""
    found = Walked()
    for number in numbers:
        key, left = LifeKey(engine, seed, number), count - found.steps
        done, wrong = live(key, place, partial(Walk.drawn, count=min(STEPS, left)))
        found.lives += 1
        found.done.update(name for name, _ in done)
        if wrong is not None:
            found.differences.append(wrong)
            print(f"{key}, step {len(done)}: {wrong}", replay_of(key, done, place), sep="\n", flush=True)
        if found.steps >= count:
            break
    return found


def replay_of(key: LifeKey, steps: list[Step], place: Path) -> str:
    """Return the steps of a life that are needed for its failure, as a text for `--replay`."""
    kept = steps
    if _fails(key, steps, place):
        kept = smallest(steps, lambda some: _fails(key, some, place))
    listed = "".join(f"  {step!r},\n" for step in kept)
    return f"({key.engine!r}, {key.seed}, {key.number}, [\n{listed}])"


def _fails(key: LifeKey, steps: list[Step], place: Path) -> bool:
    return live(key, place, lambda walk: iter(steps))[1] is not None


def replay(text: str, place: Path) -> str | None:
    """Repeat the steps in a text of `replay_of`; return the failure, or None."""
    engine, seed, number, steps = ast.literal_eval(text)
    return live(LifeKey(engine, seed, number), place, lambda walk: iter(steps))[1]


@contextmanager
def walking(place: Path | None = None) -> Iterator[Path]:
    """Prepare this process for lives; yields a directory for them, in memory unless `place` names one."""
    load()
    umask = os.umask(0)
    base = Path(tempfile.mkdtemp(prefix="ofs-walk-", dir=place or "/dev/shm"))
    try:
        with unhashed():
            yield base
    finally:
        os.umask(umask)
        shutil.rmtree(base)


def _walk_part(engine: str, seed: int, worker: int, workers: int, count: int, place: Path) -> Walked:
    return walk(engine, seed, _watched(itertools.count(worker, workers)), count, place)


def _watched(numbers: Iterable[int]) -> Iterator[int]:
    """Yield the numbers; if a life hangs, the process ends with a traceback."""
    for number in numbers:
        faulthandler.dump_traceback_later(HANGS, exit=True)
        yield number


def walk_together(engine: str, seed: int, count: int, workers: int, place: Path) -> Walked:
    """Run lives in several processes, each with its own share of the numbers."""
    found = Walked()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        share = -(-count // workers)
        for part in [pool.submit(_walk_part, engine, seed, each, workers, share, place) for each in range(workers)]:
            found.add(part.result())
    return found


def main() -> int:
    """Run lives as the command line says; return 1 if one differed from the model."""
    given = _arguments()
    with walking(given.place) as place:
        if given.replay:
            wrong = replay(given.replay.read_text(), place)
            print(wrong or "no difference")
            return int(wrong is not None)
        began = time.monotonic()
        found = walk_together(given.engine, given.seed, given.steps, given.workers, place)
    line = json.dumps(
        {"engine": given.engine, "seed": given.seed, **found.summary(), "seconds": round(time.monotonic() - began)}
    )
    print(line)
    if given.record:
        with given.record.open("a") as file:
            file.write(f"{line}\n")
    return int(bool(found.differences))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.model.walk", description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=engines.NAMES, default=engines.KERNEL)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--place", type=Path, help="directory for the layers (default: in memory)")
    parser.add_argument("--record", type=Path, help="append the line of figures to this file")
    parser.add_argument("--replay", type=Path, help="do the steps in this file instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
