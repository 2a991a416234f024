"""The manual pages: one for each command, as scripts/man writes them, without warnings, and in the package."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from overlayfs_cli.main import COMMANDS
from tests.support import requirements

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "man").iterdir())


def test_the_pages_are_those_of_the_commands_and_the_reference(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts/man", tmp_path], check=True)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    stale = [path.name for path in PAGES if written.get(path.name) != path.read_text()]
    assert not stale and len(written) == len(PAGES), f"run `make man`: {stale}"


def test_every_command_has_a_page() -> None:
    wanted = {"overlayfs.1", "overlayfs-mount.8", *(f"overlayfs-{name}.1" for name in COMMANDS)}
    assert {path.name for path in PAGES} == wanted


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_no_warnings(page: Path) -> None:
    requirements.need_program("man", "groff", "mandoc")
    linted = subprocess.run(["mandoc", "-Tlint", "-Wwarning", page], capture_output=True, text=True, check=False)
    shown = subprocess.run(["man", "--warnings", "-Tutf8", "-l", page], capture_output=True, text=True, check=True)
    assert (linted.stdout, shown.stderr) == ("", "")
    text = re.sub(".\b", "", shown.stdout)  # bold is a letter, a backspace and the letter again
    assert "\nNAME\n" in text and "\nSYNOPSIS\n" in text


def test_a_package_has_them(tmp_path: Path) -> None:
    """And every module: a wheel is built of what git knows, as pip builds it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if name.startswith(("cli/", "man/", "overlayfs/", "LICENSE", "README", "pyproject")) and (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", "wheels", "."], cwd=tmp_path, check=True
    )
    (wheel,) = (tmp_path / "wheels").iterdir()
    packed = zipfile.ZipFile(wheel).namelist()
    manuals = {name.partition("share/man/")[2] for name in packed if "share/man/" in name}
    assert manuals == {f"man{page.suffix[1:]}/{page.name}" for page in PAGES}
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("overlayfs/**/*.py")}
    modules |= {str(path.relative_to(ROOT)).replace("cli/", "overlayfs_cli/", 1) for path in ROOT.glob("cli/**/*.py")}
    assert {name for name in packed if name.endswith(".py")} == modules
