"""`overlayfs doctor`: what this machine can do, and what to do about what it cannot."""

import dataclasses

import click

from overlayfs_cli import output, store_option
from overlayfs_cli.command import command
from overlayfs_cli.diagnosis import Finding, can_mount, examine


@command(
    "Show what this machine can do.",
    """
    overlayfs doctor
    overlayfs doctor --store /data/store --json
    """,
)
@store_option.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(store: bytes | None, as_json: bool) -> int:
    """Check what overlayfs can use here, and say for each missing thing what to do about it.

    A stack is mounted for a moment in the directory for temporary files, and files are created in the file system of
    the store; nothing is left behind. The exit code is 1 if the stack could not be mounted.
    """
    findings = examine(store_option.path(store))
    mounts = can_mount(findings)
    if as_json:
        output.show_json({"can_mount": mounts, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        _show(findings)
    return 0 if mounts else 1


def _show(findings: list[Finding]) -> None:
    """Print one line for each finding, and a second one with the advice, if there is some."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        click.echo(f"{finding.state:<6}  {finding.name:<{width}}  {finding.fact}")
        if finding.advice:
            click.echo(f"{'':6}  {'':{width}}  -> {finding.advice}")
