"""The fixture of most tests: makes stacks on a driver, and ends each test with the checks."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from tests.support.drivers import Stack, driver_class
from tests.support.drivers.base import Options, Tree
from tests.support.requirements import need_root
from tests.support.spec import Dir
from tests.support.spec import Tree as Spec

EMPTY = Dir()


class StackMaker:
    """Call it with layers, top first, to get their union in use. All are closed and checked at the end."""

    def __init__(self, driver: str, place: Path) -> None:
        self.driver = driver
        self.place = place
        self.trees: list[Tree] = []

    def __call__(
        self,
        *lower: Spec | Dir,
        upper: Spec | Dir | None = EMPTY,
        base: Path | None = None,
        lower_on: list[Path] | None = None,
        options: Options | None = None,
    ) -> Tree:
        """Without `lower`, one empty layer is used; `upper` None: read-only; `base`, `lower_on`: their directories."""
        where = (base or self.place) / f"s{len(self.trees)}"
        tree = driver_class(self.driver)(Stack(where, list(lower) or [{}], upper, lower_on), options)
        self.trees.append(tree)
        return tree

    def finish(self) -> None:
        """Close all, newest first, and check and remove each stack, even if others fail."""
        with ExitStack() as after:
            for tree in self.trees:
                after.callback(tree.stack.remove)
                after.callback(tree.stack.check)
                after.callback(tree.close)


Maker = TypeVar("Maker", bound=StackMaker)


def _umask() -> int:
    """Return the umask of this process."""
    found = os.umask(0)
    os.umask(found)
    return found


UMASK = _umask()


@contextmanager
def stack_maker(driver: str, place: Path, kind: type[Maker]) -> Iterator[Maker]:
    """Yield a maker whose stacks are removed at the end; the umask is 0 meanwhile, so that modes are exact."""
    need_root()
    maker = kind(driver, place)
    os.umask(0)
    try:
        yield maker
    finally:
        os.umask(UMASK)  # not the one found before: makers may end in another order than they began
        maker.finish()
