"""Results of a measurement, as saved to JSON and loaded. The keys are stable; `format` counts changes."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 2


@dataclass
class Run:
    """One run: its value in the unit of the workload, CPU seconds of the daemon, CPU seconds of other processes."""

    value: float
    daemon: float = 0.0
    foreign: float = 0.0
    disturbed: bool = False


@dataclass
class Result:
    """All runs of one workload by one contender on one file system. `failed` is the reason why there is no figure."""

    workload: str
    group: str
    filesystem: str
    contender: str
    kind: str  # of the contender
    unit: str
    more_is_better: bool
    runs: list[Run] = field(default_factory=list)
    failed: str = ""
    requests: dict[str, int] | None = None  # answered by our engine in one run
    extra: dict[str, Any] = field(default_factory=dict)  # figures that only some workloads have

    @property
    def median(self) -> float | None:
        """The median of the runs; None if it failed."""
        return None if self.failed or not self.runs else statistics.median(run.value for run in self.runs)

    @property
    def disturbed(self) -> bool:
        """Whether other processes disturbed half of the runs or more."""
        return sum(run.disturbed for run in self.runs) * 2 >= len(self.runs) > 0


@dataclass
class Report:
    """One measurement, completely."""

    when: str
    commit: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    load: dict[str, Any]
    contenders: list[dict[str, str]]
    missing: list[dict[str, str]]
    results: list[Result] = field(default_factory=list)
    anatomy: dict[str, float] = field(default_factory=dict)  # what our start is made of, in milliseconds
    format: int = FORMAT

    def find(self, filesystem: str, workload: str, contender: str) -> Result | None:
        """Return one result, or None if that was not measured."""
        wanted = (filesystem, workload, contender)
        return next((r for r in self.results if (r.filesystem, r.workload, r.contender) == wanted), None)

    def median(self, filesystem: str, workload: str, contender: str) -> float | None:
        """Return the median of one result, or None."""
        found = self.find(filesystem, workload, contender)
        return found.median if found else None


def save(report: Report, path: Path) -> None:
    """Write a report as JSON."""
    document = asdict(report)
    for shown, result in zip(document["results"], report.results, strict=True):
        shown["median"] = result.median
    path.write_text(json.dumps(document, indent=1) + "\n")


def load(path: Path) -> Report:
    """Read a report; ValueError if it is of another format."""
    document = json.loads(path.read_text())
    if document.get("format") != FORMAT:
        raise ValueError(f"{path} has format {document.get('format')}, not {FORMAT}")
    document["results"] = [_result(each) for each in document["results"]]
    return Report(**document)


def merged(reports: list[Report]) -> Report:
    """Return several measurements as one, with the time and machine of the first.

    Compared contenders must have taken turns: a later report replaces all results of a workload that it measured again.
    """
    first = reports[0]
    found: dict[tuple[str, str], list[Result]] = {}
    for report in reports:
        for r in report.results:
            found[r.filesystem, r.workload] = []
        for r in report.results:
            found[r.filesystem, r.workload].append(r)
    first.results = [r for those in found.values() for r in those]
    for report in reports:
        first.anatomy = report.anatomy or first.anatomy
        known = {each["name"] for each in first.contenders}
        first.contenders += [each for each in report.contenders if each["name"] not in known]
    return first


def _result(document: dict[str, Any]) -> Result:
    document.pop("median")
    return Result(**{**document, "runs": [Run(**run) for run in document["runs"]]})
