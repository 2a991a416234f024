"""`overlayfs completion`: the script by which a shell completes commands, options and names."""

import os

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from overlayfs_cli.command import command
from overlayfs_cli.main import COMPLETE_VARIABLE, PROGRAM, cli

SHELLS = ("bash", "zsh", "fish")


class _Bash(BashComplete):
    """Completes words with colons, such as `site:v1`: bash splits them, and replaces only the part behind the colon."""

    _replaced_from = 0  # where the part of the last word begins that bash replaces

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the cursor without the program's name, and the word at the cursor."""
        at = int(os.environ["COMP_CWORD"])
        words = split_arg_string(os.environ["COMP_WORDS"])[: at + 1]
        words += [""] * (at + 1 - len(words))
        joined: list[str] = []
        for before, word in zip(["", *words], words, strict=False):
            if joined and ":" in (before, word):
                joined[-1] += word
            else:
                joined.append(word)
        last = words[-1]
        self._replaced_from = len(joined[-1]) - (0 if last == ":" else len(last))
        return joined[1:-1], joined[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """Return one candidate as the script reads it."""
        value = item.value[self._replaced_from :] if item.type == "plain" else item.value
        return f"{item.type},{value}"


def register() -> None:
    """Let click answer bash by `_Bash`."""
    add_completion_class(_Bash)


@command(
    "Print the script for completion in a shell.",
    """
    overlayfs completion bash > /etc/bash_completion.d/overlayfs
    overlayfs completion zsh > /usr/local/share/zsh/site-functions/_overlayfs
    overlayfs completion fish > /etc/fish/completions/overlayfs.fish
    eval "$(overlayfs completion bash)"                               # for this shell only
    """,
)
@click.argument("shell", metavar="bash|zsh|fish", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes commands, options, mount points, images and workspaces in a shell."""
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, PROGRAM, COMPLETE_VARIABLE).source(), nl=False)
