"""`overlayfs bench`: what copy-up costs on this machine, beside the peers that are installed."""

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from overlayfs.errors import UsageError, UserError
from overlayfs_cli import output, progress
from overlayfs_cli.benchmark import contenders, copyup, copyup_report
from overlayfs_cli.benchmark.contenders import Contender, Missing
from overlayfs_cli.command import command

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size(given: str) -> int:
    """Return a number of bytes from text such as `100M`; UsageError if it is none."""
    found = re.fullmatch(r"(\d+)([KMG]?)(?:iB|B)?", given.strip(), re.IGNORECASE)
    if not found:
        raise UsageError(f"{given!r} is no size; write it like 4K, 100M or 1G")
    return int(found[1]) * UNITS[found[2].upper()]


def peer(given: str) -> Contender:
    """Return the contender that NAME=COMMAND describes; UsageError if it describes none."""
    try:
        return contenders.named_peer(given)
    except ValueError as error:
        raise UsageError(f"--peer: {error}") from None


@command(
    "Measure what copy-up costs here.",
    """
    overlayfs bench copyup
    overlayfs bench copyup --size-limit 1G --json costs.json --plot costs.png
    overlayfs bench copyup --peer 'mine=/opt/fuse-overlayfs -o lowerdir=LOWER,upperdir=UPPER,workdir=WORK MOUNTPOINT'
    """,
)
@click.argument("what", metavar="copyup", type=click.Choice(["copyup"]))
@click.option("--json", "json_file", metavar="FILE", type=Path, help="Write all figures to FILE as JSON.")
@click.option("--plot", metavar="FILE", type=Path, help="Draw the times into FILE, a PNG; needs matplotlib.")
@click.option("--size-limit", metavar="SIZE", type=size, default="100M", help="The largest file [100M].")
@click.option("--rounds", metavar="N", type=click.IntRange(1), default=3, help="Fresh mounts of each [3].")
@click.option("--many", metavar="N", type=click.IntRange(1), default=1000, help="Files that are touched [1000].")
@click.option("--peer", "peers", metavar="NAME=COMMAND", multiple=True, type=peer, help="One more to compare with.")
@click.option("--dir", "place", metavar="DIR", type=Path, default="/var/tmp", help="Where to measure [/var/tmp].")
def bench(
    what: str,
    json_file: Path | None,
    plot: Path | None,
    size_limit: int,
    rounds: int,
    many: int,
    peers: tuple[Contender, ...],
    place: Path,
) -> None:
    """Change files of a layer for the first time, in our mount and in those of its peers, and show what that costs.

    The peers are those that are installed of kernel overlayfs (as root), fuse-overlayfs and unionfs-fuse, and every
    --peer, whose COMMAND has LOWER, UPPER, WORK and MOUNTPOINT in it. DIR is left as it was.
    """
    if plot is not None:
        from overlayfs_cli.benchmark import copyup_plot

        copyup_plot.need_matplotlib()
    wanted = copyup.cases(size_limit, many)
    _need_space(place, copyup.space_needed(wanted))
    with tempfile.TemporaryDirectory(dir=place, prefix="overlayfs-bench.") as directory:
        able, missing = _contenders(peers, Path(directory))
        _show_missing(missing)
        click.echo(copyup_report.heading(place))
        with progress.line() as show:
            show("making the layer")
            copyup.fill(Path(directory), wanted)
            costs = copyup.measure(able, wanted, Path(directory), rounds, show)
    _show(costs)
    if json_file is not None:
        json_file.write_text(json.dumps(copyup_report.document(able, missing, costs, place), indent=2) + "\n")
    if plot is not None:
        copyup_plot.draw(costs, copyup_report.heading(place), plot)


def _need_space(place: Path, needed: int) -> None:
    if not place.is_dir():
        raise UsageError(f"{place} is not a directory; name one with --dir")
    free = shutil.disk_usage(place).free
    if free < needed:
        amounts = f"{output.size_text(free)} are free and {output.size_text(needed)} are needed"
        raise UserError(f"not enough space in {place}: {amounts}; choose another --dir or a smaller --size-limit")


def _contenders(peers: Sequence[Contender], place: Path) -> tuple[list[Contender], list[Missing]]:
    """Return the contenders that can be mounted, and the missing ones; UserError if our own mount is one of those."""
    known = [each for each in contenders.peers() if each.copies_up]
    able, missing = contenders.present([contenders.plain(), *known, *peers, contenders.ours(contenders.OURS)], place)
    if hindered := next((each for each in missing if each.name == contenders.OURS), None):
        raise UserError(f"our own mount does not work in {place.parent}: {hindered.reason.removeprefix('overlayfs: ')}")
    return able, missing


def _show_missing(missing: Sequence[Missing]) -> None:
    for each in missing:
        click.echo(f"Not measured: {each.name} ({each.reason}).")


def _show(costs: Sequence[copyup.Cost]) -> None:
    for headings, rows in (copyup_report.times(costs), copyup_report.space(costs)):
        click.echo()
        output.show_table(headings, rows)
    for sentence in copyup_report.failures(costs):
        click.echo(f"\n{sentence}")
