"""The command line of the benchmark."""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench import acceptance, archives, catalogue, complete, live_commit, results, runner, site, verification
from bench.setting import amounts, keep, new_report, progress, runs
from overlayfs_cli.benchmark import contenders
from overlayfs_cli.benchmark.contenders import Contender

DESCRIPTION = "Measure our mount beside a plain directory, kernel overlayfs and other FUSE overlays."


def main() -> int:
    """Run the command of the command line; return the exit code."""
    given = parser().parse_args()
    signal.signal(signal.SIGTERM, _leave)  # unmount when we are terminated, too
    code: int = given.act(given)
    return code


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def parser() -> argparse.ArgumentParser:
    """Return the parser; each command sets its function as `act`."""
    whole = argparse.ArgumentParser(prog="scripts/bench", description=DESCRIPTION)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="name groups and workloads")
    listing.set_defaults(act=show_list)
    wanted = commands.add_parser("acceptance", help="only the target ratios: target, figure, met or missed")
    _add_shared(wanted)
    wanted.add_argument("--ours", default="", metavar="OPTIONS", help="mount options of our own mount, as for -o")
    wanted.set_defaults(act=show_acceptance)
    whole_run = commands.add_parser("run", help="everything, or groups and workloads: table, --json, --plots")
    _add_shared(whole_run)
    whole_run.add_argument("--plots", type=Path, metavar="DIR", help="draw pictures into DIR; needs matplotlib")
    whole_run.set_defaults(act=complete.show_run)
    _add_report(commands.add_parser("report", help="tables and pictures from the JSON of one or more runs"))
    archives.add_arguments(commands.add_parser("archives", help="import and export beside tar and umoci"))
    live_commit.add_arguments(commands.add_parser("commit", help="a live commit beside buildah and podman"))
    verification.add_arguments(commands.add_parser("verify", help="verification beside xxhsum and cat"))
    return whole


def _add_report(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("files", nargs="+", type=Path, metavar="JSON", help="a later file replaces the results of an earlier one")
    add("--into", type=Path, metavar="PAGE", help="put the tables into a page, between its marks, not on the terminal")
    add("--plots", type=Path, metavar="DIR", help="draw pictures into DIR")
    add("--history", type=Path, metavar="FILE", help="add the line of this commit to FILE")
    command.set_defaults(act=complete.show_report)


def _add_shared(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("words", nargs="*", metavar="WORKLOAD", help="only those with this in their name")
    add("--fs", action="append", metavar="KIND", help=f"{', '.join(site.KINDS)}, or a directory (ext4 and tmpfs)")
    add("--runs", type=int, default=0, metavar="N", help="counted runs of each (5; with --quick 3)")
    add("--quick", action="store_true", help="small trees and files")
    add("--again", type=int, default=3, metavar="N", help="attempts for a run that other processes disturb (3)")
    add("--peer", action="append", default=[], type=_peer, metavar="NAME=COMMAND", help="another contender; "
        "its command contains LOWER, UPPER, WORK and MOUNTPOINT and runs in the directory of the layers")  # fmt: skip
    add("--without", action="append", default=[], metavar="NAME", help="leave a contender out")
    add("--place", type=Path, default=Path("/var/tmp"), metavar="DIR", help="where images are made (/var/tmp)")
    add("--json", type=Path, metavar="FILE", help="write every single figure")


def _peer(text: str) -> Contender:
    try:
        return contenders.named_peer(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def show_list(given: argparse.Namespace) -> int:
    """Print groups and workloads."""
    for group in catalogue.GROUPS:
        print(group)
        for name in catalogue.special_names(group):
            print(f"    {name}")
        for workload in catalogue.chosen([group]):
            print(f"    {workload.name}")
    return 0


def show_acceptance(given: argparse.Namespace) -> int:
    """Measure the pairs of the targets and print one line for each; 1 if a target is missed."""
    targets = acceptance.chosen(given.words)
    if not targets:
        print(f"scripts/bench: no target has {' or '.join(given.words)} in its name", file=sys.stderr)
        return 2
    candidates = [contenders.ours(contenders.OURS, given.ours), *contenders.peers(), *given.peer]
    wanted = [each for each in candidates if each.name not in (*given.without, "mergerfs")]
    with tempfile.TemporaryDirectory(dir=given.place, prefix="overlayfs-bench.") as place:
        able, missing = contenders.present(wanted, Path(place))
    report = new_report(given, able, missing)
    _print_row(acceptance.HEADINGS)
    for kind in given.fs or ("ext4", "tmpfs"):
        _accept(given, kind, targets, able, report)
    missed = [
        r for kind in given.fs or ("ext4", "tmpfs") for r in acceptance.rows(report, targets, kind, contenders.OURS)
    ]
    return int(any(line[5] != "met" for line in missed))


def _accept(
    given: argparse.Namespace,
    kind: str,
    targets: Sequence[acceptance.Target],
    able: Sequence[Contender],
    report: results.Report,
) -> None:
    shown: set[acceptance.Target] = set()
    with site.site(kind, 12, given.place, amounts(given)) as place:
        done = set()
        for name, kinds in acceptance.needed(targets).items():
            those = [each for each in able if each.kind in kinds]
            report.results += runner.measure(catalogue.named(name), those, place, runs(given), given.again, progress)
            keep(given, report)
            done.add(name)
            for target in targets:
                if target not in shown and done.issuperset(target.workloads):
                    shown.add(target)
                    progress("")
                    _print_row(acceptance.row(report, target, place.kind, contenders.OURS))


def _print_row(cells: Sequence[str]) -> None:
    widths = (11, 31, 28, 8, 7, 7, 16, 16, 9, 0)
    print(" ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip(), flush=True)
