"""What push and pull share: the options for reaching a registry, and a line of progress for each layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from overlayfs_cli import output, progress

if TYPE_CHECKING:
    from overlayfs.oci.blobs import Notice
    from overlayfs.oci.transfer import LayerProgress, ProgressCallback

_KEY_SHOWN = 12

plain_http: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--plain-http", is_flag=True, help="Speak HTTP without TLS; only for registries on this machine."
)
ca: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--ca", metavar="FILE", help="Trust the certificates in FILE as well as the system's."
)


@contextmanager
def lines(quiet: bool) -> Iterator[tuple["ProgressCallback", "Notice"]]:
    """Yield callbacks for progress and notices.

    On a terminal, each layer has a line while it is transferred. Notices are printed after the lines are removed.
    """
    notices: list[str] = []
    try:
        with progress.board(quiet) as show:
            yield (lambda step: show(step.key, line(step))), notices.append
    finally:
        for sentence in dict.fromkeys(notices):
            progress.note(sentence)


def line(step: "LayerProgress") -> str:
    """Return the line of a layer: its digest or id, what is being done, and how much is done."""
    return f"{step.key.removeprefix('sha256:')[:_KEY_SHOWN]}  {step.doing:<12}  {_amount(step)}".rstrip()


def _amount(step: "LayerProgress") -> str:
    if not step.total:
        return output.size_text(step.done) if step.done else ""
    return f"{100 * step.done // step.total:3}%  {output.size_text(step.done)} of {output.size_text(step.total)}"
