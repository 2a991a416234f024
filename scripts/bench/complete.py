"""The commands `run` and `report`: measure, print and save."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import catalogue, page, results, runner, special, table
from bench.setting import amounts, keep, new_report, progress, runs
from bench.site import Site, site
from overlayfs_cli.benchmark import contenders
from overlayfs_cli.benchmark.contenders import Contender


def show_run(given: argparse.Namespace) -> int:
    """Measure the chosen workloads with all installed contenders; return 2 if no workload matches."""
    workloads = catalogue.chosen(given.words)
    if not workloads and not any(catalogue.specials(given.words, kind) for kind in ("ext4", "tmpfs", "xfs", "btrfs")):
        print(f"scripts/bench: nothing is called {' or '.join(given.words)}; see 'list'", file=sys.stderr)
        return 2
    candidates = [contenders.plain(), *contenders.peers(), *given.peer, *contenders.own_variants()]
    with tempfile.TemporaryDirectory(dir=given.place, prefix="overlayfs-bench.") as place:
        able, missing = contenders.present([each for each in candidates if each.name not in given.without], Path(place))
    report = new_report(given, able, missing)
    for kind in given.fs or ("ext4", "tmpfs"):
        with site(kind, 24, given.place, amounts(given)) as place_of:
            _measure_all(given, place_of, able, report)
    return _keep(given, report)


def _measure_all(given: argparse.Namespace, place: Site, able: Sequence[Contender], report: results.Report) -> None:
    for each in catalogue.specials(given.words, place.kind):
        found = each.measure(place, able, runs(given), progress)
        report.results += found
        _show(report, found)
        if each.measure is special.start_up and not report.anatomy:
            report.anatomy = special.anatomy(place, next(c for c in able if c.name == contenders.OURS))
        keep(given, report)
    for workload in catalogue.chosen(given.words):
        if place.kind in ("ext4", "tmpfs") or given.words:
            found = runner.measure(workload, able, place, runs(given), given.again, progress)
            report.results += found
            _show(report, found)
            keep(given, report)


def _show(report: results.Report, found: Sequence[results.Result]) -> None:
    """Print the rows of the newest results, so that a long run shows progress."""
    progress("")
    part = results.Report(**{**vars(report), "results": list(found)})
    for filesystem, group in table.groups(part):
        headings, rows = table.table(part, filesystem, group)
        print(table.plain_text((f"{group} on {filesystem}", *headings[1:]), rows), flush=True)
    for sentence in table.failures(part):
        print(f"  {sentence}", flush=True)


def _keep(given: argparse.Namespace, report: results.Report) -> int:
    keep(given, report)
    if given.plots:
        from bench import plots

        print(*plots.draw(report, given.plots), sep="\n", file=sys.stderr)
    return int(any(r.failed and r.kind == contenders.OURS for r in report.results))


def show_report(given: argparse.Namespace) -> int:
    """Turn the JSON of runs into tables and pictures."""
    report = results.merged([results.load(file) for file in given.files])
    pictures: list[Path] = []
    if given.plots:
        from bench import plots

        pictures = plots.draw(report, given.plots)
    text = page.text(report, pictures, given.into)
    if given.into:
        page.insert(given.into, text)
    else:
        print(text)
    if given.history:
        with open(given.history, "a") as file:
            file.write(f"{page.line(report)}\n")
    return 0
