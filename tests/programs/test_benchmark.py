"""`scripts/bench`: what it accepts as done, what it compares, and one small complete run."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import acceptance, catalogue, content, page, results, runner, table
from bench.results import Report, Result, Run
from bench.site import Site
from bench.sizes import QUICK
from bench.workload import Trial, Workload, WrongError
from overlayfs_cli.benchmark import contenders
from overlayfs_cli.benchmark.contenders import KERNEL, OURS, PLAIN
from tests.support import leftovers, requirements

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/bench"
TINY = dataclasses.replace(
    QUICK, files=20, directories=5, repository=10, modules=20, sources=3, wheels=1, wheel_files=2
)


def result(
    workload: str, contender: str, *values: float, kind: str = "peer", failed: str = "", more: bool = False
) -> Result:
    return Result(workload, "g", "ext4", contender, kind, "s", more, [Run(value) for value in values], failed)


def report(*found: Result) -> Report:
    return Report("2026-01-01T00:00:00Z", "abc", {}, {}, {}, [], [], list(found))


@pytest.fixture
def site(place: Path) -> Site:
    for name in ("site", "assets"):
        (place / name).mkdir()
    return Site("here", place / "site", place / "assets", TINY)


def target(workload: str, against: str) -> acceptance.Target:
    return next(t for t in acceptance.TARGETS if (t.workload, t.against) == (workload, against))


def test_every_target_can_be_measured() -> None:
    names = {workload.name for workload in catalogue.ALL}
    assert {name for each in acceptance.TARGETS for name in each.workloads} <= names
    assert len(names) == len(catalogue.ALL)


def test_the_best_peer_is_the_quickest_that_did_its_work() -> None:
    found = report(
        result("untar", OURS, 3.0, 1.0, 2.0, kind=OURS),
        result("untar", "slow", 8.0),
        result("untar", "quick", 4.0),
        result("untar", "wrong", 0.1, failed="left files out"),
        result("untar", "mergerfs", 0.2),
        result("untar", KERNEL, 1.0, kind=KERNEL),
    )
    row = acceptance.row(found, target("untar", acceptance.BEST_PEER), "ext4", OURS)
    assert row[:6] == ("ext4", "untar", "quick", "<= 0.7", "0.50", "met")


def test_a_failure_of_ours_is_no_figure() -> None:
    found = report(result("untar", OURS, 0.1, kind=OURS, failed="left files out"), result("untar", "peer", 4.0))
    row = acceptance.row(found, target("untar", acceptance.BEST_PEER), "ext4", OURS)
    assert row[4:7] == ("-", "FAILED", "left files out")


@pytest.mark.parametrize(("figure", "met"), [(1.69, False), (1.71, True)])
def test_more_can_be_better(figure: float, met: bool) -> None:
    found = report(result("2 clients", OURS, figure, kind=OURS), result("1 client", OURS, 1.0, kind=OURS))
    assert (acceptance.row(found, target("2 clients", "1 client"), "ext4", OURS)[5] == "met") is met


def test_a_report_survives_the_disk(place: Path) -> None:
    found = report(result("untar", OURS, 3.0, 1.0, kind=OURS), result("untar", "peer", failed="no"))
    results.save(found, place / "r.json")
    assert results.load(place / "r.json") == found
    assert [each["median"] for each in json.loads((place / "r.json").read_text())["results"]] == [2.0, None]


def test_a_later_report_replaces_what_it_measured_again() -> None:
    first = report(result("untar", OURS, 3.0), result("untar", "peer", 1.0), result("cp -r", OURS, 5.0))
    both = results.merged([first, report(result("untar", OURS, 2.0))])
    assert [(r.workload, r.median) for r in both.results] == [("untar", 2.0), ("cp -r", 5.0)]


def test_a_table_shows_ratios_failures_and_disturbances() -> None:
    disturbed = result("untar", "peer", 4.0)
    disturbed.runs[0].disturbed = True
    found = report(
        result("untar", PLAIN, 2.0, kind=PLAIN), disturbed, result("untar", OURS, 1.0, kind=OURS),
        result("cp -r", PLAIN, 2.0, kind=PLAIN), result("cp -r", OURS, failed="wrong", kind=OURS),
    )  # fmt: skip
    headings, rows = table.table(found, "ext4", "g")
    assert headings == ("", PLAIN, "peer", OURS, "OURS : BEST PEER", "REQUESTS")
    assert rows == [
        ("untar", "2.00 s", "~4.00 s (2.00)", "1.00 s (0.50)", "0.25 peer", "-"),
        ("cp -r", "2.00 s", "-", "failed", "-", "-"),
    ]


def test_a_page_keeps_what_is_around_the_measured_part(place: Path) -> None:
    path = place / "page.md"
    path.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.insert(path, "new")
    assert path.read_text() == f"before\n{page.BEGIN}\nnew\n{page.END}\nafter\n"
    path.write_text("no place for it")
    with pytest.raises(ValueError, match="lacks"):
        page.insert(path, "new")


def test_layers_together_are_the_tree(site: Site) -> None:
    content.prepare(site, "tree")
    place = site.layers("tree")
    whole = {path.relative_to(place / "whole") for path in (place / "whole").rglob("*")}
    assert {path.relative_to(place / name) for name in content.LAYERS for path in (place / name).rglob("*")} == whole


def test_a_workload_that_does_nothing_fails(site: Site) -> None:
    lazy = Workload("lazy", "g", "tree", lambda trial: None, catalogue.named("untar").check)
    found = runner.measure(lazy, [contenders.plain()], site, 1, 1, lambda line: None)
    assert [each.median for each in found] == [None]
    assert "untarred has 0 files instead of 20" in found[0].failed


@pytest.mark.parametrize(
    "name", ["untar", "cp -r", "rm -rf, lower", "grep -r warm", "git status warm", "make", "SQLite insert"]
)
def test_workloads_pass_their_own_checks_in_a_plain_directory(site: Site, name: str) -> None:
    requirements.need_program("git", "gcc", "make", "tar")
    found = runner.measure(catalogue.named(name), [contenders.plain()], site, 1, 1, lambda line: None)
    assert found[0].failed == "" and len(found[0].runs) == 1


def test_a_command_that_fails_is_wrong(site: Site) -> None:
    with pytest.raises(WrongError, match="exit code 3"):
        Trial(site.root, site, contenders.plain()).shell("exit 3")


def test_one_complete_run(place: Path) -> None:
    requirements.need_root()
    target = place / "r.json"
    words = ["run", "make and remove", "--quick", "--runs", "1", "--again", "1", "--fs", place, "--place", place]
    without = [word for name in ("fuse-overlayfs", "unionfs-fuse", "mergerfs") for word in ("--without", name)]
    line = [sys.executable, str(SCRIPT), *map(str, words), *without, "--json", str(target)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = results.load(target)
    assert {r.contender for r in found.results if r.median} >= {PLAIN, KERNEL, OURS}
    assert all(r.requests and r.requests["MKDIR"] == 100 for r in found.results if r.kind == OURS)
    assert [path.name for path in place.iterdir()] == ["r.json"] and not leftovers.mounts_below(place)
