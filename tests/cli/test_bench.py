"""`overlayfs bench copyup`, with files so small that only its form is measured."""

import json
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from overlayfs_cli import bench
from overlayfs_cli.benchmark import contenders, copyup
from overlayfs_cli.benchmark.contenders import OURS, PLAIN, Contender, Stack
from tests.cli.conftest import Run
from tests.support import leftovers, requirements

SMALL = ("--size-limit", "4K", "--rounds", "1", "--many", "3")
KEYS = ["format", "when", "machine", "load", "filesystem", "contenders", "missing", "cases"]
CASE_KEYS = ["operation", "size", "where", "contender", "files", "milliseconds"]
CASE_KEYS += ["written_bytes", "stored_bytes", "amplification", "failed"]
CASES = 2 * 6 + 2  # two sizes of six changes, the deep file, the touched directory


def measured(overlayfs: Run, place: Path, *words: str) -> tuple[str, dict[str, Any]]:
    """Run the benchmark in `place`; return what it prints and the document."""
    target = place / "costs.json"
    ended = overlayfs("bench", "copyup", *SMALL, "--dir", str(place), "--json", str(target), *words)
    assert (ended.code, ended.err) == (0, "")
    document: dict[str, Any] = json.loads(target.read_text())
    target.unlink()
    return ended.out, document


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the plain directory and our mount take part."""
    requirements.need_root()
    monkeypatch.setattr(contenders, "peers", list)


@pytest.mark.usefixtures("no_peers")
def test_the_document_has_the_keys_of_the_reference(overlayfs: Run, place: Path) -> None:
    _, document = measured(overlayfs, place)
    assert list(document) == KEYS
    assert all(list(case) == CASE_KEYS for case in document["cases"])
    assert len(document["cases"]) == 2 * CASES
    assert {case["contender"] for case in document["cases"]} == {PLAIN, OURS}
    assert [case["failed"] for case in document["cases"] if case["failed"]] == []
    assert all(list(case["milliseconds"]) == ["least", "median", "p95", "most"] for case in document["cases"])


@pytest.mark.usefixtures("no_peers")
def test_what_the_upper_holds_is_counted(overlayfs: Run, place: Path) -> None:
    _, document = measured(overlayfs, place)
    stored = {
        (case["operation"], case["size"], case["where"]): (case["stored_bytes"], case["amplification"])
        for case in document["cases"]
        if case["contender"] == OURS
    }
    assert stored["first write of 4 KiB", 4096, ""] == (4096, 1.0)
    assert stored["append of 4 KiB", 4096, ""] == (8192, 2.0)
    assert stored["append of 4 KiB", 0, ""] == (4096, 1.0)
    assert stored["rename", 0, ""] == (0, None)


@pytest.mark.usefixtures("no_peers")
def test_missing_peers_are_named(overlayfs: Run, place: Path) -> None:
    shown, document = measured(
        overlayfs, place, "--peer", "other=nosuchprogram MOUNTPOINT", "--peer", "broken=false MOUNTPOINT"
    )
    assert "Not measured: other (not installed).\nNot measured: broken (exit code 1).\n" in shown
    assert [each["name"] for each in document["missing"]] == ["other", "broken"]


def test_peers_that_are_installed_take_part(overlayfs: Run, place: Path) -> None:
    requirements.need_root()
    requirements.need_program("fuse-overlayfs")
    shown, document = measured(overlayfs, place)
    names = {each["name"] for each in document["contenders"]}
    assert {PLAIN, OURS, "kernel", "fuse-overlayfs"} <= names
    assert all(name in shown for name in names)


@pytest.mark.usefixtures("no_peers")
def test_nothing_stays(overlayfs: Run, place: Path) -> None:
    measured(overlayfs, place)
    assert os.listdir(place) == [] and not leftovers.mounts_below(place)


@pytest.mark.usefixtures("no_peers")
def test_a_failure_in_the_middle_leaves_no_mount(overlayfs: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(cost: copyup.Cost, mount: contenders.Mounted, base: Path, exclusive: bool) -> None:
        if mount.pid is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(copyup, "_one", broken)
    assert overlayfs("bench", "copyup", *SMALL, "--dir", str(place)).code == 130
    assert os.listdir(place) == [] and not leftovers.mounts_below(place)


@pytest.mark.usefixtures("no_peers")
def test_the_picture_is_a_png(overlayfs: Run, place: Path) -> None:
    pytest.importorskip("matplotlib")
    target = place / "costs.png"
    assert overlayfs("bench", "copyup", *SMALL, "--dir", str(place), "--plot", str(target)).code == 0
    header = target.read_bytes()[:24]
    assert header.startswith(b"\x89PNG") and min(struct.unpack(">II", header[16:])) > 500


def test_a_wrong_result_gives_no_figure(place: Path) -> None:
    """A contender that loses the change: a mount that drops the first write."""
    case = copyup.Case("chmod", 4096, 2)
    copyup.fill(place, [case])
    forgetful = contenders.Mounted(place / copyup.LAYER, place / "upper", None)
    cost = copyup.Cost(case, "forgetful")
    operation = copyup.OPERATIONS["chmod"]
    lost = copyup.Operation(lambda path: None, operation.check)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(copyup.OPERATIONS, "chmod", lost)
        copyup._one(cost, forgetful, place, exclusive=False)
    assert (cost.failed, cost.median) == ("the mode was not changed", None)


def test_a_layer_that_was_changed_is_noticed(place: Path) -> None:
    case = copyup.Case("first write of 4 KiB", 4096, 1)
    copyup.fill(place, [case])
    through = contenders.Mounted(place / copyup.LAYER, place / "upper", None)  # writes go into the layer itself
    cost = copyup.Cost(case, "careless")
    copyup._one(cost, through, place, exclusive=False)
    assert "bytes at" in cost.failed or "layer was changed" in cost.failed


@pytest.mark.parametrize(("given", "size"), [("0", 0), ("4K", 4096), ("100M", 100 << 20), ("1g", 1 << 30)])
def test_sizes(given: str, size: int) -> None:
    assert bench.size(given) == size


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--size-limit", "much"), "'much' is no size; write it like 4K, 100M or 1G"),
        (("--peer", "nobody"), "--peer: 'nobody' is not NAME=COMMAND"),
        (("--peer", "x=true"), "--peer: the command of x has no MOUNTPOINT"),
        (("--dir", "/nosuchdirectory"), "/nosuchdirectory is not a directory; name one with --dir"),
    ],
)
def test_wrong_use_is_one_sentence(overlayfs: Run, words: tuple[str, ...], sentence: str) -> None:
    assert overlayfs("bench", "copyup", *words) == (2, "", f"overlayfs: {sentence}\n")


def test_too_little_space_is_reported_before_the_work(overlayfs: Run, place: Path) -> None:
    ended = overlayfs("bench", "copyup", "--dir", str(place), "--many", str(1 << 40))
    assert ended.code == 1 and ended.err.startswith(f"overlayfs: not enough space in {place}: ")


def test_our_own_mount_must_work(overlayfs: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "peers", list)
    monkeypatch.setattr(contenders, "ours", lambda name: Contender(name, ("false",), OURS))
    ended = overlayfs("bench", "copyup", *SMALL, "--dir", str(place))
    assert (ended.code, ended.err) == (1, f"overlayfs: our own mount does not work in {place}: exit code 1\n")
    assert os.listdir(place) == []


def test_words_of_a_command_line_are_filled_in() -> None:
    stack = Stack(Path("/b"), ("2", "1"), Path("/s/upper"), Path("/s/work"), Path("/s/mnt"))
    peer = contenders.named_peer("x=mine -o lowerdir=LOWER,upperdir=UPPER,workdir=WORK MOUNTPOINT")
    assert stack.words(peer.command) == ["mine", "-o", "lowerdir=2:1,upperdir=/s/upper,workdir=/s/work", "/s/mnt"]
    assert stack.words(("BRANCHES",)) == ["/s/upper=RW:2=RO:1=RO"]


def test_a_mount_in_use_is_still_unmounted(place: Path) -> None:
    requirements.need_root()
    (place / "layer").mkdir()
    with contenders.mounted(contenders.peers()[0], place, ("layer",)) as mount:
        user = subprocess.Popen(["cat"], cwd=mount.root, stdin=subprocess.PIPE)
    user.communicate()
    assert not leftovers.mounts_below(place)
