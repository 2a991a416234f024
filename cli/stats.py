"""`overlayfs stats`: what the kernel has asked a mount for."""

import sys
import time
from typing import Any

import click

from overlayfs_cli import arguments, output
from overlayfs_cli.command import command

PERIOD = 1.0  # seconds between two looks of --watch


@command(
    "Show what the kernel has asked a mount for.",
    """
    overlayfs stats /mnt
    overlayfs stats /mnt --watch
    """,
)
@click.argument("mountpoint", metavar="MNT", type=arguments.path)
@click.option("--watch", is_flag=True, help="Print what was added every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document (with --watch one per line).")
def stats(mountpoint: bytes, watch: bool, as_json: bool) -> None:
    """Show how many requests of each kind the engine of MNT has answered."""
    from overlayfs.mount import control

    found = control.request(mountpoint, "stats")
    if watch:
        _watch(mountpoint, found, as_json)
    elif as_json:
        output.show_json(found)
    else:
        _show(found["requests"], f"{found['engine']}, up {found['uptime']:.0f} s")


def _show(requests: dict[str, int], title: str) -> None:
    click.echo(f"{title}: {sum(requests.values())} requests")
    ordered = sorted(requests.items(), key=lambda item: -item[1])
    output.show_table(("REQUEST", "COUNT"), [(kind, str(count)) for kind, count in ordered])


def _watch(mountpoint: bytes, before: dict[str, Any], as_json: bool) -> None:
    """Print what each period adds; ends with the mount, or when the user has seen enough."""
    from overlayfs.mount import control

    while True:
        time.sleep(PERIOD)
        now = control.request(mountpoint, "stats")
        added = _difference(before["requests"], now["requests"])
        if as_json:
            output.show_json_line({**now, "requests": added})
        else:
            click.echo(f"{sum(added.values())} requests  " + "  ".join(f"{kind} {n}" for kind, n in added.items()))
        sys.stdout.flush()
        before = now


def _difference(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    return {kind: count - before.get(kind, 0) for kind, count in now.items() if count != before.get(kind, 0)}
