"""Shared by the commands: the amount of work, the head of a report, progress on the terminal."""

import argparse
import sys
from collections.abc import Sequence

from bench import results, sizes
from overlayfs_cli.benchmark import contenders, machine
from overlayfs_cli.benchmark.contenders import Contender


def progress(line: str) -> None:
    """Show the current step on a terminal; the next call overwrites it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}" if line else "\r\x1b[K")
        sys.stderr.flush()


def new_report(
    given: argparse.Namespace, able: Sequence[Contender], missing: Sequence[contenders.Missing]
) -> results.Report:
    """Return a report without results."""
    for each in missing:
        print(f"left out: {each.name}: {each.reason}", file=sys.stderr)
    if busy := machine.warning():
        print(f"note: {busy}", file=sys.stderr)
    settings = {"runs": runs(given), "quick": given.quick, "again": given.again, "arguments": sys.argv[1:]}
    return results.Report(
        machine.now(),
        machine.commit(),
        machine.describe(),
        settings,
        machine.load(),
        [{"name": each.name, "command": " ".join(each.command), "version": machine.version(each)} for each in able],
        [{"name": each.name, "reason": each.reason} for each in missing],
    )


def runs(given: argparse.Namespace) -> int:
    """Return the number of counted runs."""
    return int(given.runs) or (3 if given.quick else 5)


def amounts(given: argparse.Namespace) -> sizes.Sizes:
    """Return the sizes of the workloads."""
    return sizes.QUICK if given.quick else sizes.FULL


def keep(given: argparse.Namespace, report: results.Report) -> None:
    """Save the results so far, so that a long run that is interrupted is not lost."""
    if given.json:
        results.save(report, given.json)
