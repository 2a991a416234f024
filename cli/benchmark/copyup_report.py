"""The costs of copy-up as tables for a terminal and as a document for programs."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from overlayfs_cli.benchmark import machine
from overlayfs_cli.benchmark.contenders import PLAIN, Contender, Missing
from overlayfs_cli.benchmark.copyup import OPERATIONS, Case, Cost
from overlayfs_cli.output import size_text

FORMAT = 1  # of the document

Rows = list[tuple[str, ...]]


def document(
    able: Sequence[Contender], missing: Sequence[Missing], costs: Sequence[Cost], place: Path
) -> dict[str, Any]:
    """Return everything, with stable keys: times in milliseconds, sizes in bytes."""
    return {
        "format": FORMAT,
        "when": machine.now(),
        "machine": machine.describe(),
        "load": machine.load(),
        "filesystem": machine.filesystem(place),
        "contenders": [
            {"name": each.name, "command": " ".join(each.command), "version": machine.version(each)} for each in able
        ],
        "missing": [{"name": each.name, "reason": each.reason} for each in missing],
        "cases": [_case_document(cost) for cost in costs],
    }


def _case_document(cost: Cost) -> dict[str, Any]:
    return {
        "operation": cost.case.operation,
        "size": cost.case.size,
        "where": cost.case.where,
        "contender": cost.contender,
        "files": len(cost.seconds),
        "milliseconds": None if cost.failed else _distribution([second * 1000 for second in cost.seconds]),
        "written_bytes": OPERATIONS[cost.case.operation].written,
        "stored_bytes": cost.bytes_stored,
        "amplification": cost.amplification,
        "failed": cost.failed or None,
    }


def _distribution(values: Sequence[float]) -> dict[str, float]:
    """Return the minimum, the median, the 95th percentile and the maximum."""
    ordered = sorted(values)
    found = {
        "least": ordered[0],
        "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))],
        "most": ordered[-1],
    }
    return {name: round(value, 4) for name, value in found.items()}


def heading(place: Path) -> str:
    """Return the lines above the tables: what is measured, and on which machine."""
    about = machine.describe()
    where = f"{machine.filesystem(place)}, kernel {about['kernel']}, {about['cores']} cores"
    return (
        f"What the first change to a file in a layer costs ({where}, load {machine.load()['average'][0]:.1f}).\n"
        "It is copied to the upper before it can be changed. `plain` is an ordinary directory: nothing is copied.\n"
        "`kernel` and `ours` bring a copy to the disk before they show it: a crash leaves no half of it."
    )


def times(costs: Sequence[Cost]) -> tuple[tuple[str, ...], Rows]:
    """Return headings and rows of the times: median, and the slowest of all where there were enough to tell."""
    names = contender_names(costs)
    rows: Rows = []
    for operation, those in _by_operation(costs):
        rows.append((operation.upper(), *("" for _ in names)))
        for case in dict.fromkeys(cost.case for cost in those):
            found = {cost.contender: cost for cost in those if cost.case == case}
            rows.append((f"  {label(case)}", *(_time_cell(found[name]) for name in names)))
    return ("MILLISECONDS: MEDIAN (SLOWEST)", *names), rows


def space(costs: Sequence[Cost]) -> tuple[tuple[str, ...], Rows]:
    """Return headings and rows of the bytes that were stored for each changed file."""
    names = [name for name in contender_names(costs) if name != PLAIN]
    rows: Rows = []
    for case in dict.fromkeys(cost.case for cost in costs):
        found = {cost.contender: cost for cost in costs if cost.case == case}
        if case.size:
            cells = (_space_cell(found[name]) for name in names)
            rows.append((f"{case.operation}, {label(case)}", *cells))
    return ("STORED IN THE UPPER FOR EACH FILE (TIMES WHAT WAS WRITTEN)", *names), rows


def failures(costs: Sequence[Cost]) -> list[str]:
    """Return a sentence for each contender and reason of a failure, with the cases that failed so."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for cost in costs:
        if cost.failed:
            reasons.setdefault((cost.contender, cost.failed), []).append(f"{cost.case.operation}, {label(cost.case)}")
    return [f"{name} fails at {'; '.join(those)}: {reason}" for (name, reason), those in reasons.items()]


def contender_names(costs: Sequence[Cost]) -> list[str]:
    """Return the names of the contenders that were measured, in order."""
    return list(dict.fromkeys(cost.contender for cost in costs))


def _by_operation(costs: Sequence[Cost]) -> list[tuple[str, list[Cost]]]:
    names = dict.fromkeys(cost.case.operation for cost in costs)
    return [(name, [cost for cost in costs if cost.case.operation == name]) for name in names]


def label(case: Case) -> str:
    """Return what files a case is about."""
    special = {
        "deep": "20 directories deep",
        "sparse": "a hole but for 1 MiB",
        "one directory": f"{case.files} files of one directory",
    }
    return f"{size_text(case.size)}{', ' * bool(case.where)}{special.get(case.where, '')}"


def _time_cell(cost: Cost) -> str:
    median = cost.median
    if median is None:
        return "failed"
    return f"{_number(median * 1000)} ({_number(max(cost.seconds) * 1000)})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _space_cell(cost: Cost) -> str:
    if cost.bytes_stored is None:
        return "failed"
    times_written = f" ({cost.amplification:.0f}x)" if cost.amplification is not None else ""
    return f"{size_text(max(0, cost.bytes_stored))}{times_written}"
