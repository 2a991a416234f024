"""`overlayfs stats`: counts the requests of the kernel."""

import sys
import time
from typing import TYPE_CHECKING

import click

from overlayfs_cli import arguments, output
from overlayfs_cli.command import command

if TYPE_CHECKING:
    from overlayfs.mount.control_client import Client
    from overlayfs.mount.control_protocol import StatsReply

PERIOD = 1.0  # seconds between two lines of --watch


@command(
    "Show what the kernel has asked a mount for.",
    """
    overlayfs stats /mnt
    overlayfs stats /mnt --watch
    """,
)
@click.argument("mountpoint", metavar="MNT", type=arguments.mountpoint)
@click.option("--watch", is_flag=True, help="Print what was added every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document (with --watch one per line).")
def stats(mountpoint: bytes, watch: bool, as_json: bool) -> None:
    """Show how many requests of each kind the engine of MNT has answered."""
    from overlayfs.mount.control_client import Client

    client = Client.at(mountpoint)
    if watch:
        _watch(client, as_json)
        return
    found = client.stats()
    if as_json:
        output.show_json(_document(found, found.requests))
    else:
        _show(found.requests, f"{found.engine}, up {found.uptime:.0f} s")


def _document(found: "StatsReply", requests: dict[str, int]) -> dict[str, object]:
    return {"engine": found.engine, "uptime": found.uptime, "requests": requests}


def _show(requests: dict[str, int], title: str) -> None:
    click.echo(f"{title}: {sum(requests.values())} requests")
    ordered = sorted(requests.items(), key=lambda item: -item[1])
    output.show_table(("REQUEST", "COUNT"), [(kind, str(count)) for kind, count in ordered])


def _watch(client: "Client", as_json: bool) -> None:
    """Print what each period adds; ends with the mount or with Ctrl-C."""
    before = client.stats().requests
    while True:
        time.sleep(PERIOD)
        now = client.stats()
        added = _difference(before, now.requests)
        if as_json:
            output.show_json_line(_document(now, added))
        else:
            click.echo(f"{sum(added.values())} requests  " + "  ".join(f"{kind} {n}" for kind, n in added.items()))
        sys.stdout.flush()
        before = now.requests


def _difference(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    return {kind: count - before.get(kind, 0) for kind, count in now.items() if count != before.get(kind, 0)}
