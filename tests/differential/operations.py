"""Random operations: drawn from a seed and described as values, so that the same ones can run on two trees."""

import random
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.support.drivers import Stat, Tree
from tests.support.spec import Dir, File, Link, Short, Special, Symlink, Whiteout, entry, flatten
from tests.support.spec import Tree as Spec
from tests.support.syscalls import EXCHANGE, NOREPLACE

NAMES = ("a", "b", "c", "d", "e")
BASE_TIME = 1_500_000_000_000_000_000


@dataclass(frozen=True)
class Operation:
    """A method of a tree and its arguments."""

    name: str
    args: tuple[object, ...]

    def __str__(self) -> str:
        return f"{self.name}{self.args!r}"

    def run(self, tree: Tree) -> object:
        """Run it; return the result, or the name of the error."""
        act: Callable[..., object] = getattr(tree, self.name)
        try:
            return comparable(act(*self.args))
        except OSError as error:
            return f"errno {error.errno}"


def comparable(result: object) -> object:
    """The part of a result that two trees must share."""
    if isinstance(result, Stat):
        directory = stat.S_ISDIR(result.mode)
        return result.mode, result.uid, result.gid, None if directory else (result.size, result.nlink)
    return result


class Generator:
    """Draws operations over paths of up to three names, so that they often meet at the same path."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def path(self) -> str:
        return "/".join(self.random.choice(NAMES) for _ in range(self.random.choice((1, 1, 2, 2, 3))))

    def data(self) -> bytes:
        return self.random.randbytes(self.random.choice((0, 1, 10, 5000)))

    def operation(self) -> Operation:
        """The next one."""
        name, draw = self.random.choice(self.choices)
        return Operation(name, draw(self))

    @property
    def choices(self) -> list[tuple[str, Callable[["Generator"], tuple[object, ...]]]]:
        """Weighted by repetition."""
        pick = self.random.choice
        rare: list[tuple[str, Callable[[Generator], tuple[object, ...]]]] = [
            ("mkfifo", lambda g: (g.path(),)),
            ("symlink", lambda g: (g.path(), g.path())),
            ("link", lambda g: (g.path(), g.path())),
            ("link", lambda g: (g.path(), g.path())),
            ("chmod", lambda g: (g.path(), pick((0o600, 0o755, 0o4755, 0o2775, 0o1777)))),
            ("chown", lambda g: (g.path(), pick((0, 1, 1000)), pick((0, 5, 1000)))),
            ("utime", lambda g: (g.path(), BASE_TIME, BASE_TIME + g.random.randrange(10**9))),
            ("truncate", lambda g: (g.path(), pick((0, 1, 3, 6000)))),
            ("replace", lambda g: (g.path(), g.data())),
            ("setxattr", lambda g: (g.path(), "user." + pick(NAMES), g.data()[:20], pick((0, 0, 1, 2)))),
            ("removexattr", lambda g: (g.path(), "user." + pick(NAMES))),
            ("stat", lambda g: (g.path(),)),
            ("read", lambda g: (g.path(),)),
            ("readlink", lambda g: (g.path(),)),
            ("names", lambda g: (g.path(),)),
            ("listxattr", lambda g: (g.path(),)),
        ]
        frequent: list[tuple[str, Callable[[Generator], tuple[object, ...]]]] = [
            ("create", lambda g: (g.path(), g.data(), pick((0o644, 0o600)))),
            ("mkdir", lambda g: (g.path(), pick((0o755, 0o700)))),
            ("unlink", lambda g: (g.path(),)),
            ("rmdir", lambda g: (g.path(),)),
            ("remove_tree", lambda g: (g.path(),)),
            ("rename", lambda g: (g.path(), g.path())),
            ("rename", lambda g: (g.path(), g.path())),
            ("rename", lambda g: (g.path(), g.path(), pick((NOREPLACE, EXCHANGE)))),
            # never empty: the kernel changes the mtime already when such a file is merely opened
            ("write", lambda g: (g.path(), g.data() + b"w", pick((0, 3, 7000)))),
        ]
        return rare + frequent * 2

    def layer(self, depth: int = 3, *, whiteouts: bool = False) -> dict[str, Short]:
        """A random layer; with `whiteouts` one that also hides names."""
        tree: dict[str, Short] = {}
        for name in NAMES:
            if self.random.random() < 0.75:
                tree[name] = self._entry(depth, whiteouts)
        return tree

    def _entry(self, depth: int, whiteouts: bool) -> Short:
        kind = self.random.choice(
            ("dir", "dir", "dir", "file", "file", "symlink", "fifo", *["whiteout", "opaque"] * whiteouts)
        )
        mode = self.random.choice((0o755, 0o700, 0o644))
        if kind in ("dir", "opaque") and depth > 1:
            children = self.layer(depth - 1, whiteouts=whiteouts)
            return Dir(children, mode=mode | 0o100, opaque="trusted" if kind == "opaque" else None)
        if kind == "symlink":
            return Symlink(target=self.path())
        if kind == "fifo":
            return Special(kind="p", mode=mode)
        if kind == "whiteout":
            return Whiteout()
        return File(self.data(), mode=mode, mtime_ns=BASE_TIME + self.random.randrange(10**9))

    def layers(self) -> list[Spec]:
        """Two or three layers, top first; some files of the lowest have a second name."""
        lowest = self.layer()
        files = [name for name, item in lowest.items() if isinstance(item, File)]
        if files:
            lowest["z"] = Link(files[0])
        layers: list[Spec] = [lowest]
        for _ in range(self.random.choice((1, 2))):
            layers.insert(0, without_idle_whiteouts(self.layer(whiteouts=True), flatten(layers)))
        return layers


def without_idle_whiteouts(layer: Spec, below: Spec) -> Spec:
    """The layer without whiteouts that cover nothing: the kernel lists those in directories that are not merged."""
    result: dict[str, Short] = {}
    for name, short in layer.items():
        item = entry(short)
        if isinstance(item, Dir):
            under = entry(below.get(name, b""))
            covered = under.children if isinstance(under, Dir) and item.opaque is None else {}
            result[name] = replace(item, children=without_idle_whiteouts(item.children, covered))
        elif not isinstance(item, Whiteout) or name in below:
            result[name] = item
    return result
