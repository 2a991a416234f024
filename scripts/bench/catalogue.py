"""All workloads, by group."""

from collections.abc import Iterable, Sequence

from bench import clients, data, depth, metadata, work
from bench.workload import Workload

ALL: tuple[Workload, ...] = (
    *metadata.WORKLOADS,
    *depth.WORKLOADS,
    *data.WORKLOADS,
    *work.WORKLOADS,
    *clients.WORKLOADS,
)
GROUPS = tuple(dict.fromkeys(each.group for each in ALL))


def named(name: str) -> Workload:
    """Return the workload of a name."""
    return next(each for each in ALL if each.name == name)


def in_order(names: Iterable[str]) -> list[str]:
    """Return names in the order of the catalogue."""
    wanted = set(names)
    return [each.name for each in ALL if each.name in wanted]


def chosen(words: Sequence[str]) -> list[Workload]:
    """Return the workloads of groups, or with names that contain a word; all of them if there are no words."""
    return [each for each in ALL if not words or each.group in words or any(word in each.name for word in words)]
