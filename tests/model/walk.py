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
class Who:
    """One life: all that is random in it follows from this."""

    engine: str
    seed: int
    number: int


@dataclass
class Walked:
    """What was done, by kind, and a text for each life that was not as the model has it."""

    done: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """How many steps that is."""
        return self.done.total()

    def summary(self) -> dict[str, object]:
        """The figures for a record."""
        lives = {"lives": self.lives, "remounts": self.done["remount"]}
        commits = self.done["commit"] + self.done["commit_live"]
        return {"steps": self.steps, **lives, "commits": commits, "differences": len(self.differences)}

    def add(self, other: "Walked") -> None:
        """Count the work of another one as well."""
        self.done += other.done
        self.lives += other.lives
        self.differences += other.differences


# --- one life ----------------------------------------------------------------------------------------------


class Walk:
    """A life under way."""

    def __init__(self, who: Who, place: Path) -> None:
        self.random = random.Random(f"{who.seed}/{who.number}")
        self.place = Path(tempfile.mkdtemp(prefix="life-", dir=place))
        self.life = Life()
        self.options = {"engine": who.engine, **self.random.choice(OPTIONS)}
        self.layers = layers(self.random.choice)
        if "metacopy" in self.options:
            self.layers[-1] = {**self.layers[-1], "y": File(b"no twin")}  # nothing keeps a link count (deviations.md)
        self.kind = self.random.choice((ForkedMount, ForkedImage))
        self.life.unseen_writers = who.engine == engines.KERNEL and self.kind is ForkedMount
        self.tree: ForkedMount | None = None

    def begin(self) -> None:
        """Mount."""
        upper = None if self.kind is ForkedImage else EMPTY
        self.tree = self.kind(Stack(self.place / "s", list(self.layers), upper), self.options)
        self.life.begin(self.tree, Model(flatten(self.layers)))

    def drawn(self, count: int) -> Iterator[Step]:
        """So many steps; each is drawn when the one before is done."""
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
        """Whether the step can be done now, and is one that the options promise to keep."""
        if step[0] == "link" and "metacopy" in self.options:  # nothing keeps a link count over commits (deviations.md)
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
        """Take away what is left, however the life has ended."""
        if self.tree is not None:
            self.tree.kill()
        shutil.rmtree(self.place, ignore_errors=True)  # what is left after a hang is for `walking` to complain of


def _touched(step: Step) -> list[str]:
    return [step[1][each] for each in ("path", "old", "new") if each in step[1]]


def _follows(model: Model, path: str) -> bool:
    """Whether the kernel would follow a symlink on the way, and do the step elsewhere."""
    above = parts(path)[:-1]
    with suppress(OSError):
        for count in range(1, len(above) + 1):
            thing = model.find("/".join(above[:count]))
            if isinstance(thing, Item):
                return thing.kind == "symlink"
    return False


def live(who: Who, place: Path, source: Source) -> tuple[list[Step], str | None]:
    """One life: the steps that were done, and what was wrong at the last of them, if anything was."""
    walk, done = Walk(who, place), list[Step]()
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
    """Lives of these numbers, until `count` steps are done."""
    found = Walked()
    for number in numbers:
        who, left = Who(engine, seed, number), count - found.steps
        done, wrong = live(who, place, partial(Walk.drawn, count=min(STEPS, left)))
        found.lives += 1
        found.done.update(name for name, _ in done)
        if wrong is not None:
            found.differences.append(wrong)
            print(f"{who}, step {len(done)}: {wrong}", replay_of(who, done, place), sep="\n", flush=True)
        if found.steps >= count:
            break
    return found


def replay_of(who: Who, steps: list[Step], place: Path) -> str:
    """The steps of a life that matter, as a text for `--replay`."""
    kept = steps
    if _fails(who, steps, place):
        kept = smallest(steps, lambda some: _fails(who, some, place))
    listed = "".join(f"  {step!r},\n" for step in kept)
    return f"({who.engine!r}, {who.seed}, {who.number}, [\n{listed}])"


def _fails(who: Who, steps: list[Step], place: Path) -> bool:
    return live(who, place, lambda walk: iter(steps))[1] is not None


def replay(text: str, place: Path) -> str | None:
    """Do again what `replay_of` told; what is wrong, if anything is."""
    engine, seed, number, steps = ast.literal_eval(text)
    return live(Who(engine, seed, number), place, lambda walk: iter(steps))[1]


@contextmanager
def walking(place: Path | None = None) -> Iterator[Path]:
    """What lives need of this process; a directory for them, in memory unless `place` names one."""
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
    """The same; between two of them the process ends loudly if it hangs."""
    for number in numbers:
        faulthandler.dump_traceback_later(HANGS, exit=True)
        yield number


def walk_together(engine: str, seed: int, count: int, workers: int, place: Path) -> Walked:
    """The same in several processes, which take turns in the numbers of the lives."""
    found = Walked()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        share = -(-count // workers)
        for part in [pool.submit(_walk_part, engine, seed, each, workers, share, place) for each in range(workers)]:
            found.add(part.result())
    return found


def main() -> int:
    """Walk as the command line says; 1 if a life differed from the model."""
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
    parser.add_argument("--place", type=Path, help="where the layers lie (default: in memory)")
    parser.add_argument("--record", type=Path, help="append the line of figures to this file")
    parser.add_argument("--replay", type=Path, help="do the steps in this file instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
