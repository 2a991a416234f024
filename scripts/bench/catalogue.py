"""All workloads, by group."""

from collections.abc import Iterable, Sequence

from bench import clients, data, depth, metadata, special, work
from bench.workload import Workload

ALL: tuple[Workload, ...] = (
    *metadata.WORKLOADS,
    *depth.WORKLOADS,
    *data.WORKLOADS,
    *work.WORKLOADS,
    *clients.WORKLOADS,
)
GROUPS = tuple(dict.fromkeys([*(each.group for each in ALL), *(each.group for each in special.ALL)]))


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


def specials(words: Sequence[str], kind: str) -> list[special.Special]:
    """Return the selected special measurements for one kind of file system."""
    return [
        each for each in special.ALL if kind in each.kinds and (not words or each.group in words or each.name in words)
    ]


def special_names(group: str) -> list[str]:
    """Return the names of the special measurements in a group."""
    return [each.name for each in special.ALL if each.group == group]
