"""The measured part of docs/performance.md, and the line of docs/performance.txt."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import acceptance, table
from bench.results import Report
from overlayfs_cli.benchmark.contenders import OURS

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
HISTORY = (  # workload, against, name in the line
    ("untar", acceptance.BEST_PEER, "untar"),
    ("rm -rf, lower", acceptance.BEST_PEER, "rm"),
    ("find warm", acceptance.BEST_PEER, "find"),
    ("grep -r warm", acceptance.BEST_PEER, "grep"),
    ("git status warm", acceptance.BEST_PEER, "git"),
    ("SQLite insert", acceptance.BEST_PEER, "sqlite"),
    ("write 4 KiB blocks", acceptance.BEST_PEER, "write4k"),
    ("pip install", acceptance.BEST_PEER, "pip"),
    ("2 clients", "1 client", "clients"),
)


def insert(page: Path, text: str) -> None:
    """Replace the measured part of a page; ValueError if the page has no marks for it."""
    whole = page.read_text()
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks {BEGIN} or {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def text(report: Report, pictures: Sequence[Path], page: Path | None) -> str:
    """Return the measured part as Markdown."""
    return "\n\n".join(_parts(report, pictures, page))


def _parts(report: Report, pictures: Sequence[Path], page: Path | None) -> Iterator[str]:
    yield machine(report)
    yield "### Targets"
    yield "Our figure divided by theirs. The best peer is the fastest of the other FUSE overlays in the same run."
    yield table.markdown(*targets(report))
    for picture in pictures:
        place = picture.relative_to(page.parent) if page else picture
        yield f"![{picture.stem.replace('-', ' ')}]({place})"
    for filesystem, group in table.groups(report):
        yield f"### {group.capitalize()}, on {filesystem}"
        yield table.markdown(*table.table(report, filesystem, group))
    if failed := table.failures(report):
        yield "### Failures"
        yield "\n".join(f"- {sentence}" for sentence in dict.fromkeys(failed))


def machine(report: Report) -> str:
    """Return the paragraph about the machine and the time of the measurement."""
    about, load = report.machine, report.load
    size = ", small trees (--quick)" if report.settings["quick"] else ""
    waits = ", ".join(f"{kind} {value} %" for kind, value in load["pressure"].items() if value is not None)
    versions = "; ".join(f"{each['name']}: {each['version']}" for each in report.contenders if each["version"])
    left_out = "; ".join(f"{each['name']} ({each['reason']})" for each in report.missing) or "none"
    return (
        f"Measured {report.when} at commit `{report.commit}`: {about['system']}, Linux {about['kernel']},"
        f" {about['cores']} cores ({about['cpu']}{', virtual' * about['virtual']}), {about['memory_mib']} MiB;"
        f" medians of {report.settings['runs']}{size}. Load before: {load['average'][0]} (tasks waited: {waits}).\n"
        f"Versions: {versions}. Left out: {left_out}."
    )


def targets(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the table of the targets: one line for each, one column for each file system."""
    kinds = [kind for kind in dict.fromkeys(r.filesystem for r in report.results) if kind in ("ext4", "tmpfs")]
    rows = []
    for target in acceptance.TARGETS:
        cells = [_target_cell(acceptance.row(report, target, kind, OURS)) for kind in kinds]
        rows.append((target.workload, target.against, target.shown, *cells))
    return ("", "against", "target", *kinds), rows


def _target_cell(row: tuple[str, ...]) -> str:
    if row[5] == "FAILED":
        return f"- ({row[6]})"
    return f"{row[4]} {row[5].lower()} ({row[6]} : {row[7]})"


def line(report: Report) -> str:
    """Return the line for the history: time, commit, and the most important ratios on ext4 and tmpfs."""
    return " ".join([report.when, report.commit, *_figures(report)])


def _figures(report: Report) -> Iterator[str]:
    for kind in ("ext4", "tmpfs"):
        for workload, against, name in HISTORY:
            target = next(t for t in acceptance.TARGETS if (t.workload, t.against) == (workload, against))
            row = acceptance.row(report, target, kind, OURS)
            if row[5] != "FAILED":
                yield f"{kind}.{name}={row[4]}"
