"""`overlayfs import` and `export`: what they print, how they refuse, how they end early."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ended, Run, process, program
from tests.oci.archives import END, file, pax
from tests.support.requirements import need_root

LAYER = file(b"f", b"content") + END


@pytest.fixture
def base(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with a layer, and a store of its own."""
    need_root()
    monkeypatch.setenv("OVERLAYFS_STORE", str(place / "store"))
    monkeypatch.chdir(place)
    (place / "layer.tar").write_bytes(LAYER)
    return place


def done(ended: Ended) -> str:
    assert (ended.code, ended.err) == (0, "")
    return ended.out


def test_in_and_out(overlayfs: Run, base: Path) -> None:
    assert done(overlayfs("import", "layer.tar", "-t", "site:1")) == "site:1\n"
    made = json.loads(done(overlayfs("import", "layer.tar", "-t", "again", "--json", "-m", "text")))
    assert made["image"] == "again:latest"
    assert made["layers"] == json.loads(done(overlayfs("images", "--json")))["images"][1]["layers"]
    assert done(overlayfs("export", "site:1", "-o", "out.tar")) == "out.tar\n"
    assert json.loads(done(overlayfs("export", "site:1", "-o", "layout", "--json"))) == {
        "image": "site:1", "destination": "layout", "format": "oci",
    }  # fmt: skip
    assert done(overlayfs("export", "site:1", "-o", "tree", "--format", "dir")) == "tree\n"
    assert (base / "tree" / "f").read_text() == "content"
    for source in ("out.tar", "layout", "tree"):
        assert done(overlayfs("import", source, "-t", "back")) == "back:latest\n"


def test_through_standard_streams(base: Path) -> None:
    line = "overlayfs import - -t one < layer.tar && overlayfs export one -o - | overlayfs import - -t two"
    path = f"{Path(program('overlayfs')).parent}:{os.environ['PATH']}"
    ended = subprocess.run(line, shell=True, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "one:latest\ntwo:latest\n", "")
    shown = json.loads(process("overlayfs", "images", "--json").out)["images"]
    assert shown[0]["layers"] == shown[1]["layers"]


REFUSALS: list[tuple[tuple[str, ...], int, str]] = [
    (("import", "missing", "-t", "x"), 1, "missing does not exist"),
    (("import", "layer.tar"), 2, "missing option '-t' / '--tag'; see 'overlayfs import --help'"),
    (("import", "layer.tar", "-t", "Bad"), 1, "'Bad' is not an image name; write NAME[:TAG] with lower-case letters, "
     "digits and . _ - / in NAME"),
    (("import", "layer.tar", "-t", "x", "--platform", "a/b/c/d"), 2, "'a/b/c/d' is not a platform; write "
     "OS/ARCHITECTURE[/VARIANT], as in linux/arm64"),
    (("import", "layer.tar:v1", "-t", "x"), 1, "layer.tar is not an archive of images, so it has no image v1"),
    (("import", ".:v1", "-t", "x"), 1, ". is not an image layout, so it has no image v1"),
    (("import", "hostile", "-t", "x"), 1, "hostile is refused: the entry ../x leads out of the archive's root"),
    (("export", "missing", "-o", "x"), 1, "there is no image missing:latest; `overlayfs images` lists them"),
    (("export", "one", "-o", "layer.tar"), 1, "layer.tar exists already; name a file or directory that does not"),
    (("export", "one", "-o", "x/y"), 1, "cannot write x/y: {place}/x: No such file or directory"),
    (("export", "one", "-o", "x", "--format", "dir", "--compression", "gzip"), 2, "a directory is not compressed; "
     "leave --compression out, or choose another --format"),
    (("export", "one", "-o", "-", "--format", "oci"), 2, "the format oci is a directory and cannot go to standard "
     "output; choose an archive"),
    (("export", "one", "-o", "-", "--json"), 2, "the archive and --json cannot both go to standard output; "
     "leave one out"),
    (("export", "one", "-o", "x", "--format", "zip"), 2, "invalid value for '--format': 'zip' is not one of 'oci', "
     "'oci-archive', 'docker-archive', 'tar', 'dir'; see 'overlayfs export --help'"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "sentence"), REFUSALS, ids=[" ".join(words) for words, _, _ in REFUSALS])
def test_refusals(overlayfs: Run, base: Path, words: tuple[str, ...], code: int, sentence: str) -> None:
    (base / "hostile").write_bytes(file(b"../x") + END)
    done(overlayfs("import", "layer.tar", "-t", "one"))
    before = sorted(os.listdir(base))
    ended = overlayfs(*words)
    assert (ended.code, ended.out, ended.err) == (code, "", f"overlayfs: {sentence.format(place=base)}\n")
    assert sorted(os.listdir(base)) == before


def test_what_is_left_out_is_reported(overlayfs: Run, base: Path) -> None:
    (base / "tree").mkdir()
    os.mknod(base / "tree" / "socket", 0o140644)
    ended = overlayfs("import", "tree", "-t", "x")
    assert (ended.code, ended.out) == (0, "x:latest\n")
    assert ended.err == "overlayfs: note: 1 sockets were left out: archives have no form for them\n"


def _interrupted(start: Callable[[], "subprocess.Popen[bytes]"], until: Callable[[], bool]) -> tuple[int, bytes]:
    """Start a program, wait for the condition `until`, and press Ctrl-C."""
    running = start()
    try:
        while not until():
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=30)
    finally:
        running.kill()
    return running.returncode, err


def test_ctrl_c_leaves_nothing_of_an_import(base: Path) -> None:
    staging = base / "store" / "staging"

    def start() -> "subprocess.Popen[bytes]":
        made = subprocess.Popen(
            [program("overlayfs"), "import", "-", "-t", "x"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert made.stdin is not None
        made.stdin.write(file(b"f", b"x" * (8 << 20)) + LAYER[:512])
        made.stdin.flush()
        return made

    code, err = _interrupted(start, lambda: any(staging.glob("*/tree/f")) if staging.exists() else False)
    assert (code, err) == (130, b"\n")
    assert {room: os.listdir(base / "store" / room) for room in ("staging", "layers", "images", "trash")} == {
        "staging": [], "layers": [], "images": [], "trash": [],
    }  # fmt: skip


def test_ctrl_c_leaves_nothing_of_an_export(base: Path) -> None:
    hole = {b"GNU.sparse.map": b"0,4", b"GNU.sparse.size": b"%d" % (1 << 30)}  # seconds of work, and no room
    (base / "large.tar").write_bytes(pax(hole) + file(b"f", b"data") + END)
    assert process("overlayfs", "import", "large.tar", "-t", "large").code == 0
    before = sorted(os.listdir(base))

    def start() -> "subprocess.Popen[bytes]":
        words = [program("overlayfs"), "export", "large", "-o", "out.tar", "--compression", "zstd"]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    code, err = _interrupted(start, lambda: sorted(os.listdir(base)) != before)
    assert code == 130, err
    assert sorted(os.listdir(base)) == before


def test_a_reader_that_goes_away(base: Path) -> None:
    assert process("overlayfs", "import", "layer.tar", "-t", "x").code == 0
    line = f"{program('overlayfs')} export x -o - | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert ended.returncode in (0, 1)
    assert ended.stderr in ("", "overlayfs: Broken pipe\n")
