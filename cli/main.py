"""`overlayfs`: finds the command, runs it, and turns every failure into one sentence and an exit code."""

import importlib
import keyword
import os

import click

from overlayfs import __version__
from overlayfs.errors import UserError, one_line
from overlayfs_cli.command import example_block

PROGRAM = "overlayfs"
DEBUG_VARIABLE = "OVERLAYFS_DEBUG"  # set: an unexpected error ends with its traceback
COMPLETE_VARIABLE = "_OVERLAYFS_COMPLETE"  # set by the scripts of `overlayfs completion`
COMMANDS = (  # in the order of --help
    *("mount", "umount", "mounts", "commit", "diff", "why", "stats"),
    *("import", "export", "push", "pull"),
    *("images", "layers", "workspaces", "log", "tag", "squash", "rm", "verify", "gc"),
    *("bench", "doctor", "bugreport", "completion"),
)
INTERRUPTED = 130

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class LazyGroup(click.Group):
    """A group whose commands are imported on use, so that `overlayfs mount` does not wait for the others' imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command. Module and function have its name, with an underscore if it is a keyword of Python."""
        if cmd_name not in COMMANDS:
            return None
        name = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command = getattr(importlib.import_module(f"overlayfs_cli.{name}"), name)
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=LazyGroup,
    context_settings=CONTEXT,
    epilog=example_block("""
        overlayfs mount --lower /layers/top --lower /layers/base --upper /data/up /mnt
        overlayfs diff /mnt
        overlayfs commit /mnt --to /layers/new
        overlayfs umount /mnt
        """),
)
@click.version_option(__version__, "-V", "--version", prog_name=PROGRAM, message="%(prog)s %(version)s")
def cli() -> None:
    """Mount a stack of directories as one tree, change it, commit the changes as a new layer."""


def main() -> int:
    """Run the program with the arguments of the process; return its exit code."""
    if COMPLETE_VARIABLE in os.environ:
        from overlayfs_cli import completion

        completion.register()
    try:
        code = cli.main(prog_name=PROGRAM, complete_var=COMPLETE_VARIABLE, standalone_mode=False)
    except click.Abort:  # Ctrl-C; click has ended the line
        return INTERRUPTED
    except Exception as error:
        return _failed(error)
    return code if isinstance(code, int) else 0


def _failed(error: Exception) -> int:
    """Print one sentence about a failure; return its exit code."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return 2
    if isinstance(error, click.ClickException):
        complain(_usage_sentence(error))
        return 2
    if isinstance(error, UserError):
        complain(str(error))
        return error.exit_code
    if DEBUG_VARIABLE in os.environ:
        raise error
    if isinstance(error, OSError) and error.strerror:
        complain(f"{_path_of(error)}{error.strerror}")
        return 1
    complain(f"unexpected {type(error).__name__}: {error} (a defect; {DEBUG_VARIABLE}=1 shows where)")
    return 1


def complain(sentence: str) -> None:
    """Write one line to standard error."""
    click.echo(f"{PROGRAM}: {one_line(sentence)}", err=True)


def _path_of(error: OSError) -> str:
    return f"{os.fsdecode(error.filename)}: " if error.filename else ""


def _usage_sentence(error: click.ClickException) -> str:
    """Return click's message in the form of ours: lower case, no full stop, and which help to read."""
    message = error.format_message().replace("\n", " ").rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    command = context.command_path if context else PROGRAM
    return f"{message[:1].lower()}{message[1:]}; see '{command} --help'"
