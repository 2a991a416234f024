"""The performance targets: the ratio of our figure to that of another contender, met or missed."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench import catalogue
from bench.results import Report, Result
from overlayfs_cli.benchmark.contenders import KERNEL, OURS

BEST_PEER = "best peer"


@dataclass(frozen=True)
class Target:
    """Our figure for `workload` divided by that of `against` must be at most `most`, or at least `least`.

    `against` is BEST_PEER, KERNEL, or the name of another workload, whose figure of our own mount is compared; `least`
    is for workloads of which more is better.
    """

    workload: str
    against: str
    most: float = 0.0
    least: float = 0.0

    @property
    def shown(self) -> str:
        """The target, for a table."""
        return f"<= {self.most}" if self.most else f">= {self.least}"

    def is_met(self, figure: float) -> bool:
        """Return whether a figure meets the target."""
        return figure <= self.most if self.most else figure >= self.least

    @property
    def workloads(self) -> tuple[str, ...]:
        """The workloads that must be measured for the target."""
        return (self.workload,) if self.against in (BEST_PEER, KERNEL) else (self.workload, self.against)


TARGETS = (
    Target("untar", BEST_PEER, 0.7),
    Target("cp -r", BEST_PEER, 0.8),
    Target("rm -rf, lower", BEST_PEER, 0.7),
    Target("rm -rf, upper", BEST_PEER, 0.7),
    Target("find cold", BEST_PEER, 0.9),
    Target("find warm", BEST_PEER, 0.6),
    Target("grep -r cold", BEST_PEER, 0.7),
    Target("grep -r warm", BEST_PEER, 0.7),
    Target("git status cold", BEST_PEER, 0.5),
    Target("git status warm", BEST_PEER, 0.5),
    Target("SQLite insert", BEST_PEER, 0.6),
    Target("pip install", BEST_PEER, 0.8),
    Target("write 4 KiB blocks", BEST_PEER, 0.1),
    Target("Python, 300 imports, cold", BEST_PEER, 1.0),
    Target("Python, 300 imports, warm", BEST_PEER, 1.0),
    Target("write 1 MiB blocks", KERNEL, 1.2),
    Target("read cold", KERNEL, 1.2),
    Target("read warm", KERNEL, 1.2),
    Target("write 4 KiB blocks", KERNEL, 1.2),
    Target("random 4 KiB", KERNEL, 1.2),
    Target("find warm", KERNEL, 1.5),
    Target("stat warm", KERNEL, 1.5),
    Target("look-up hit, known, 500 layers", "look-up hit, known, 1 layer", 1.2),
    Target("look-up miss, known, 500 layers", "look-up miss, known, 1 layer", 1.2),
    Target("2 clients", "1 client", least=1.7),
)

HEADINGS = ("FILE SYSTEM", "WORKLOAD", "AGAINST", "TARGET", "FIGURE", "", "OURS", "THEIRS", "REQUESTS", "FOREIGN")


def chosen(words: Sequence[str]) -> list[Target]:
    """Return the targets whose workload contains one of the words; all of them if there are none."""
    return [each for each in TARGETS if not words or any(word in each.workload for word in words)]


def needed(targets: Sequence[Target]) -> dict[str, set[str]]:
    """Return what must be measured: the kinds of contenders by workload."""
    wanted: dict[str, set[str]] = {}
    for target in targets:
        for workload in target.workloads:
            wanted.setdefault(workload, {OURS}).update(_kinds(target))
    return {name: wanted[name] for name in catalogue.in_order(wanted)}


def _kinds(target: Target) -> set[str]:
    return {BEST_PEER: {"peer"}, KERNEL: {KERNEL}}.get(target.against, set())


def rows(report: Report, targets: Sequence[Target], filesystem: str, own: str) -> Iterator[tuple[str, ...]]:
    """Yield the lines of the table for one file system; `own` is the name of our contender."""
    for target in targets:
        yield row(report, target, filesystem, own)


def row(report: Report, target: Target, filesystem: str, own: str) -> tuple[str, ...]:
    """Return one line of the table."""
    mine = report.find(filesystem, target.workload, own)
    theirs = opponent(report, target, filesystem, own)
    named = theirs.contender if theirs and target.against == BEST_PEER else target.against
    head = (filesystem, target.workload, named, target.shown)
    if mine is None or mine.median is None or theirs is None or theirs.median is None:
        failed = next((r.failed for r in (mine, theirs) if r and r.failed), "not measured")
        return (*head, "-", "FAILED", failed[:60], "", "", "")
    figure = mine.median / theirs.median
    verdict = "met" if target.is_met(figure) else "MISSED"
    requests = str(sum(mine.requests.values())) if mine.requests else "-"
    return (*head, f"{figure:.2f}", verdict, value(mine), value(theirs), requests, other_processes(mine, theirs))


def opponent(report: Report, target: Target, filesystem: str, own: str) -> Result | None:
    """Return the result to compare with; for the best peer that of the fastest peer."""
    if target.against == KERNEL:
        return report.find(filesystem, target.workload, KERNEL)
    if target.against != BEST_PEER:
        return report.find(filesystem, target.against, own)
    found = [r for r in report.results if (r.filesystem, r.workload, r.kind) == (filesystem, target.workload, "peer")]
    able = [r for r in found if r.median is not None and r.contender != "mergerfs"]
    return min(able, key=lambda r: r.median or 0.0) if able else None


def value(result: Result) -> str:
    """Return a median with its unit."""
    median = result.median or 0.0
    return f"{median:.3f} s" if result.unit == "s" else f"{median:.1f} {result.unit}"


def other_processes(*results: Result) -> str:
    """Return how many runs other processes disturbed and their median CPU seconds, or an empty string."""
    shares = [run.foreign for result in results for run in result.runs if run.disturbed]
    return f"{len(shares)} runs disturbed, {statistics.median(shares):.2f} s" if shares else ""
