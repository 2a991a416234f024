"""Results as tables, for a terminal and for a page."""

from collections.abc import Iterator, Sequence

from bench.results import Report, Result
from overlayfs_cli.benchmark.contenders import OURS, PLAIN

Rows = list[tuple[str, ...]]


def groups(report: Report) -> Iterator[tuple[str, str]]:
    """Yield the file system and group of each table, in the order of measurement."""
    yield from dict.fromkeys((result.filesystem, result.group) for result in report.results)


def table(report: Report, filesystem: str, group: str) -> tuple[tuple[str, ...], Rows]:
    """Return headings and rows of one table: medians, in brackets the ratio to the plain directory."""
    those = [r for r in report.results if (r.filesystem, r.group) == (filesystem, group)]
    names = list(dict.fromkeys(result.contender for result in those))
    rows: Rows = []
    for workload in dict.fromkeys(result.workload for result in those):
        found = {r.contender: r for r in those if r.workload == workload}
        cells = tuple(cell(found.get(name), found.get(PLAIN)) for name in names)
        rows.append((workload, *cells, best_ratio(list(found.values())), requests(found.get(OURS))))
    return ("", *names, "OURS : BEST PEER", "REQUESTS"), rows


def cell(result: Result | None, base: Result | None) -> str:
    """Return a median with the ratio to the plain directory, and a tilde if other processes disturbed it."""
    if result is None:
        return "-"
    median = result.median
    if median is None:
        return "failed"
    tilde = "~" if result.disturbed else ""
    shown = f"{tilde}{amount(median)} {result.unit}"
    if result is base or base is None or not base.median:
        return shown
    return f"{shown} ({ratio(cost(result, base))})"


def cost(mine: Result, theirs: Result) -> float:
    """Return the cost of one result divided by that of another: lower is better in every unit."""
    ours, others = mine.median or 0.0, theirs.median or 1.0
    return others / (ours or 1.0) if mine.more_is_better else ours / others


def amount(value: float) -> str:
    """Return a number with three significant digits."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def ratio(value: float) -> str:
    """Return a ratio."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def best_ratio(results: Sequence[Result]) -> str:
    """Return our cost divided by that of the best FUSE peer, with its name; below 1.0 ours is better."""
    mine = next((r for r in results if r.contender == OURS), None)
    peers = [r for r in results if r.kind == "peer" and r.median and r.contender != "mergerfs"]
    if mine is None or mine.median is None or not peers:
        return "-"
    best = (max if mine.more_is_better else min)(peers, key=lambda r: r.median or 0.0)
    return f"{ratio(cost(mine, best))} {best.contender}"


def requests(result: Result | None) -> str:
    """Return the number of requests that our engine has answered."""
    return str(sum(result.requests.values())) if result and result.requests is not None else "-"


def failures(report: Report) -> list[str]:
    """Return a sentence for each contender and reason, with the workloads that failed so."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in report.results:
        if r.failed:
            reasons.setdefault((r.contender, r.failed), []).append(f"{r.workload} on {r.filesystem}")
    return [f"{name} fails at {'; '.join(those)}: {reason}" for (name, reason), those in reasons.items()]


def plain_text(headings: Sequence[str], rows: Rows) -> str:
    """Return a table for a terminal."""
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown(headings: Sequence[str], rows: Rows) -> str:
    """Return a table for a page."""
    lines = [headings, ["---", *("---:" for _ in headings[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
