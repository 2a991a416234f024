"""Help texts, the reference, the README and the packaging agree with the program."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import click
import pytest

from overlayfs import __version__
from overlayfs.mount import options
from overlayfs_cli.main import COMMANDS, cli
from tests.cli.conftest import Run, process

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs/cli.md").read_text()


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_begins_with_the_command(overlayfs: Run, name: str) -> None:
    shown = overlayfs(name, "--help")
    assert shown.code == 0 and shown.err == ""
    assert f"  Example:\n    overlayfs {name}" in shown.out
    assert overlayfs(name, "-h") == shown


def test_the_list_of_commands_is_complete(overlayfs: Run) -> None:
    files = {
        path.stem.removesuffix("_")
        for path in (ROOT / "cli").glob("*.py")
        if re.search(r"^@command\(", path.read_text(), re.MULTILINE)
    }
    assert files == set(COMMANDS)
    shown = overlayfs("--help").out
    assert all(re.search(rf"^  {name}  ", shown, re.MULTILINE) for name in COMMANDS)
    assert all((command(name).short_help or "") in shown for name in COMMANDS)


def _flags(name: str) -> list[str]:
    options = (param for param in command(name).params if isinstance(param, click.Option))
    return [flag for option in options for flag in option.opts if flag.startswith("-")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_flag_is_in_the_reference(name: str) -> None:
    section = re.search(rf"^## overlayfs {name}\n(.*?)^## ", REFERENCE, re.MULTILINE | re.DOTALL)
    assert section is not None
    assert [flag for flag in _flags(name) if not re.search(rf"{flag}\b", section[1])] == []


def test_every_option_of_o_is_in_the_reference() -> None:
    table = REFERENCE[REFERENCE.index("\n## Options\n") :]
    named = {*options._SPECIAL, *options._STACK, *options._MOUNT, *options._IGNORED} - {"remount"}
    opposites = {
        f"no{name}" for name in ("suid", "dev", "exec", "atime", "diratime", "relatime", "strictatime", "lazytime")
    }
    families = {name for name in named if "splice" in name}
    missing = [name for name in named - opposites - families - {"async"} if f"`{name}" not in table]
    assert missing == []


def test_version(overlayfs: Run) -> None:
    assert overlayfs("--version") == overlayfs("-V") == (0, f"overlayfs {__version__}\n", "")
    assert metadata.version("overlayfs") == __version__
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = re.findall(r"^scripts/setup\b.* && .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == ["scripts/setup && scripts/demo", "scripts/setup --tests && make check"]
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == commands[1]


def test_every_package_is_packed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("overlayfs/**/__init__.py")}
    there |= {"overlayfs_cli", "overlayfs_cli.benchmark"}
    assert set(listed) == there


def test_every_link_of_the_documents_resolves() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []


def test_nothing_imports_cli_by_its_directory() -> None:
    sources = [*ROOT.glob("overlayfs/**/*.py"), *ROOT.glob("cli/*.py"), *ROOT.glob("tests/**/*.py")]
    pattern = re.compile(r"^\s*(from|import) cli\b", re.MULTILINE)
    assert [path.name for path in sources if pattern.search(path.read_text())] == []


def test_a_command_loads_only_its_own() -> None:
    code = (
        "import sys; from overlayfs_cli.main import cli; import click;"
        "cli.get_command(click.Context(cli), 'mount');"
        "print(*sorted(m for m in sys.modules if m in {'trio', 'pyfuse3', 'rich'} or m.startswith('overlayfs_cli.')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    others = {f"overlayfs_cli.{name}" for name in COMMANDS} - {"overlayfs_cli.mount"}
    assert not others & set(loaded) and not {"trio", "pyfuse3", "rich"} & set(loaded)


def test_the_installed_programs_run() -> None:
    assert process("overlayfs", "--version").out == f"overlayfs {__version__}\n"
    assert process("overlayfs-mount", "--version").out == f"overlayfs-mount {__version__}\n"
