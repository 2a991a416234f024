"""How paths and tables look on a terminal and in a pipe."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayfs_cli import output
from overlayfs_cli.why import within


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (b"etc/hosts", "etc/hosts"),
        ("grün/été".encode(), "grün/été"),
        (b"two words", "two words"),
        (b"a\nb", '"a\\nb"'),
        (b"\xff", '"\\377"'),
        (b'"quoted"', '"\\"quoted\\""'),
        (b"esc\x1b[31m", '"esc\\033[31m"'),
        (b"", '""'),
    ],
)
def test_paths(path: bytes, text: str) -> None:
    assert output.path_text(path) == text


@given(st.binary(), st.binary())
def test_paths_are_one_line_and_distinct(one: bytes, other: bytes) -> None:
    text = output.path_text(one)
    assert text.isprintable()
    text.encode()
    assert (one == other) == (text == output.path_text(other))


@given(st.binary())
def test_json_keeps_every_byte(path: bytes) -> None:
    text = output.json_text(path)
    assert text is not None and os.fsencode(json.loads(json.dumps(text))) == path


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_table(("NAME", "N"), [("a", "10"), ("longer", "2")])
    assert capsys.readouterr().out == "NAME    N\na       10\nlonger  2\n"


def test_no_rows_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_table(("NAME",), [])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("mountpoint", "path", "inside"),
    [
        (b"/mnt", b"etc/hosts", b"/etc/hosts"),
        (b"/mnt", b"/etc/hosts", b"/etc/hosts"),
        (b"/mnt", b"/mnt/etc/hosts", b"/etc/hosts"),
        (b"/mnt/", b"/mnt", b"/"),
        (b"mnt", b"mnt/a/", b"/a"),
        (b"/mnt", b"/mntx/a", b"/mntx/a"),
        (b"/", b"/a", b"/a"),
    ],
)
def test_paths_within_a_mount(mountpoint: bytes, path: bytes, inside: bytes) -> None:
    assert within(mountpoint, path) == inside
