"""`overlayfs bugreport`: the facts that help to find a defect, in one text that can be posted in public."""

import os
import platform
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from overlayfs import __version__
from overlayfs.errors import UserError
from overlayfs_cli import arguments, store_option
from overlayfs_cli.command import command
from overlayfs_cli.main import complain

if TYPE_CHECKING:
    from overlayfs.mount.control_protocol import ReportReply

WIDTH = 100
INDENT = "    "  # Markdown shows what is indented by four as it is
_LABEL = 18


@command(
    "Print the facts that a bug report needs.",
    """
    overlayfs bugreport
    overlayfs bugreport /mnt
    """,
)
@click.argument("mountpoint", metavar="[MNT]", required=False, type=arguments.mountpoint)
@store_option.option
def bugreport(mountpoint: bytes | None, store: bytes | None) -> int:
    """Print versions, the findings of doctor and, of the mount at MNT, what its daemon reports.

    It is meant to be posted in public as it is: no names or contents of files are in it, no names of hosts or users.
    """
    code = 0
    report = None
    if mountpoint is not None:
        try:
            report = _ask(mountpoint)
        except UserError as error:
            complain(str(error))
            code = error.exit_code
    lines = [*_program(), *_findings(store)]
    if mountpoint is not None:
        lines += [""] + (["the daemon of the mount does not answer"] if report is None else list(_mount(report)))
    click.echo("\n".join((INDENT + line).rstrip() for line in lines))
    return code


def _ask(mountpoint: bytes) -> "ReportReply":
    from overlayfs.mount.control_client import Client

    return Client.at(mountpoint).report()


def _program() -> Iterator[str]:
    from overlayfs_cli.benchmark import machine

    here = machine.describe()
    yield from _fact("overlayfs", __version__)
    yield from _fact("distribution", str(here["system"]) or "unknown")
    yield from _fact("machine", f"{platform.machine()}, {here['cores']} CPUs, {here['memory_mib']} MiB")
    yield from _fact("virtual", "yes" if here["virtual"] else "no")
    yield from _fact("user", "root" if os.geteuid() == 0 else "not root")


def _findings(store: bytes | None) -> Iterator[str]:
    """What `overlayfs doctor` finds, without its advice, which may name files."""
    from overlayfs_cli.diagnosis import examine

    for finding in examine(store_option.path(store)):
        yield from _fact(finding.name, f"{finding.state}: {finding.fact}")


def _mount(report: "ReportReply") -> Iterator[str]:
    yield from _fact("engine", f"{report.engine}, up {report.uptime:.0f} s")
    if report.version != __version__:
        yield from _fact("daemon", f"overlayfs {report.version}, Python {report.python}")
    minor = "unknown" if report.protocol.minor is None else f"7.{report.protocol.minor}"
    yield from _fact("FUSE protocol", minor)
    yield from _fact("FUSE features", " ".join(report.protocol.features) or "none known")
    yield from _fact("options", " ".join(f"{name}={value}" for name, value in report.options.items()) or "defaults")
    types = ", ".join(f"{count} on {kind}" for kind, count in report.lower_types.items())
    yield from _fact("layers", f"{report.layers}: {types}")
    yield from _fact("upper", "none" if report.upper_type is None else f"on {report.upper_type}")
    yield from _fact("image", "yes" if report.image_mount else "no")
    for notice in report.notices:
        yield from _fact("notice", notice)
    counted = sorted(report.requests.items(), key=lambda item: -item[1])
    yield from _fact("requests", " ".join(f"{kind}={count}" for kind, count in counted) or "none")
    yield from _log(report)


def _log(report: "ReportReply") -> Iterator[str]:
    """The latest messages, each with the seconds since the latest one; their arguments are left out."""
    latest = max((message.time for message in report.log), default=0.0)
    for message in report.log:
        error = f" ({message.error})" if message.error else ""
        text = f"{message.time - latest:.1f} s {message.level} {message.logger}: {message.text}{error}"
        yield from _fact("log", text)


def _fact(label: str, text: str) -> Iterable[str]:
    """Return the lines of one fact, filled to the width, under its label."""
    indent = " " * _LABEL
    return textwrap.wrap(
        text, WIDTH - len(INDENT), initial_indent=f"{label:<{_LABEL}}", subsequent_indent=indent, break_on_hyphens=False
    )
