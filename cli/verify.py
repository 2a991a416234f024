"""`overlayfs verify`: compares the content of the store with what was recorded when it was made."""

import os
from typing import TYPE_CHECKING

import click

from overlayfs_cli import arguments, output, progress, store_option
from overlayfs_cli.command import command

if TYPE_CHECKING:
    from overlayfs.store.verify import Checked, Problem

FILES = (
    "record",
    "manifest",
    "index",
    "remote",
)  # kinds of problems of the store's own files: no path of a tree is printed


@command(
    "Read everything in the store and print what is damaged.",
    """
    overlayfs verify
    overlayfs verify site
    overlayfs verify site --repair-from registry.example.org/site:1
    """,
)
@click.argument("what", metavar="[IMAGE|LAYER]", required=False, type=arguments.image)
@click.option(
    "--repair-from",
    "source",
    metavar="IMAGE|STORE|REGISTRY",
    help="Repair from an image of this store, the directory of another store, or REGISTRY/REPO[:TAG].",
)
@click.option("--plain-http", is_flag=True, help="Do not use TLS for a registry on this machine.")
@store_option.option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print only problems, and no progress.")
@click.pass_context
def verify(
    context: click.Context,
    what: str | None,
    source: str | None,
    plain_http: bool,
    store: bytes | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare every file of an image, of a layer or of the whole store with what was recorded when it was made.

    Each line names one thing that is damaged, missing, extra or unreadable, and the differences; the exit code is then
    1. With --repair-from, lines that begin with "repaired" name what was repaired.
    """
    with store_option.opened(store) as opened, progress.line(quiet) as show:
        total = output.size_text(opened.recorded_size(what))

        def count(entries: int, size: int) -> None:
            show(f"{entries} entries, {output.size_text(size)} of {total}")

        if source is None:
            before = after = opened.verify(what, progress=count)
        else:
            before, after = opened.repair(what, source=source, progress=count, report=show, plain_http=plain_http)
    repaired = [each for each in before.problems if each not in after.problems]
    if as_json:
        output.show_json({**_document(after), "repaired": [_problem(each) for each in repaired]})
    else:
        _show(after, repaired, quiet)
    if after.problems:
        context.exit(1)


def _document(checked: "Checked") -> dict[str, object]:
    return {
        "layers": checked.layers,
        "entries": checked.entries,
        "size": checked.size,
        "unfinished": list(checked.unfinished),
        "problems": [_problem(each) for each in checked.problems],
    }


def _problem(found: "Problem") -> dict[str, object]:
    return {
        "layer": found.layer or None,
        "path": os.fsdecode(found.path if not found.layer else b"/" + found.path),
        "kind": found.kind,
        "differs": list(found.differs),
    }


def _show(checked: "Checked", repaired: "list[Problem]", quiet: bool) -> None:
    for problem in repaired:
        click.echo(f"repaired {_line(problem)}")
    for problem in checked.problems:
        click.echo(_line(problem))
    if quiet:
        return
    for layer_id in checked.unfinished:
        click.echo(f"layer {output.short_id(layer_id)} has not been hashed yet, so it cannot be verified", err=True)
    if not checked.problems:
        size = output.size_text(checked.size)
        layers = "1 layer" if checked.layers == 1 else f"{checked.layers} layers"
        click.echo(f"{layers}, {checked.entries} entries, {size}: as recorded")


def _line(problem: "Problem") -> str:
    differs = f": {', '.join(problem.differs)}" if problem.differs else ""
    if not problem.layer:
        return f"{_word(problem.kind)} {output.path_text(problem.path)}{differs}"
    where = f"layer {output.short_id(problem.layer)}"
    if problem.kind in FILES:
        return f"{_word(problem.kind)} {where} {problem.kind}{differs}"
    return f"{problem.kind} {where} {output.path_text(b'/' + problem.path)}{differs}"


def _word(kind: str) -> str:
    return "damaged" if kind in FILES else kind
