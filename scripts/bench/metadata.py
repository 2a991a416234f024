"""Workloads of names and attributes: trees unpacked, copied, listed, removed. Many layers are in depth.py."""

import os
from functools import cache
from pathlib import Path

from bench.workload import Step, Trial, Workload, expect, expect_gone, shell

GROUP = "metadata"
STAT_ROUNDS = 5


@cache
def known(layers: Path, name: str) -> tuple[int, int, int]:
    """Return files, bytes and entries of a prepared tree."""
    files = [path.lstat() for path in (layers / "whole" / name).rglob("*")]
    regular = [status.st_size for status in files if status.st_mode & 0o170000 == 0o100000]
    return len(regular), sum(regular), len(files) + 1


def same_as_tree(name: str) -> Step:
    """Return a check that a directory has the same files and bytes as the prepared tree."""

    def check(trial: Trial) -> None:
        files, size, _ = known(trial.site.layers("tree"), "tree")
        found = [path.lstat().st_size for path in trial.path(name).rglob("*") if path.is_file()]
        expect(len(found) == files, f"{name} has {len(found)} files instead of {files}")
        expect(sum(found) == size, f"{name} has {sum(found)} bytes instead of {size}")

    return check


def all_listed(trial: Trial) -> None:
    """Check that find(1) has printed every entry."""
    entries = known(trial.site.layers("tree"), "tree")[2]
    expect(trial.lines() == entries, f"{trial.lines()} entries were listed instead of {entries}")


def stat_all(trial: Trial) -> None:
    """Ask for the attributes of every file, several times."""
    names = trial.remembered
    assert isinstance(names, list)
    for _ in range(STAT_ROUNDS):
        for name in names:
            os.stat(name)


def remember_names(trial: Trial) -> None:
    """Note the path of every file, and have the kernel know them."""
    trial.remembered = [os.fspath(path) for path in trial.path("tree").rglob("*") if path.stat()]


def all_stated(trial: Trial) -> None:
    """Check that stat_all had every entry to ask for."""
    assert isinstance(trial.remembered, list)
    expect(len(trial.remembered) + 1 == known(trial.site.layers("tree"), "tree")[2], "some names were not seen")


def clean(trial: Trial) -> None:
    """Check that git has found no change."""
    expect(trial.seen == b"", f"git sees changes: {trial.seen[:80]!r}")


def list_huge(trial: Trial) -> None:
    """List a directory of many files."""
    trial.value = None
    trial.remembered = len(os.listdir(trial.path("huge")))


def huge_listed(trial: Trial) -> None:
    """Check that nothing was left out."""
    files = known(trial.site.layers("huge"), "huge")[0]
    expect(trial.remembered == files, f"{trial.remembered} names were listed instead of {files}")


DEEP = 100
DEEP_PATH = "/".join(["deep"] * DEEP)
REFRESH = "cd repository; git update-index -q --refresh"
STATUS = "cd repository; git status --porcelain"

WORKLOADS = (
    Workload("untar", GROUP, "tree", shell("tar -xf $A/tree.tar"), same_as_tree("untarred"), copies_up=False),
    Workload("cp -r", GROUP, "tree", shell("cp -r tree copy"), same_as_tree("copy"), copies_up=False),
    Workload("rm -rf, lower", GROUP, "tree", shell("rm -rf tree"), expect_gone("tree")),
    Workload(
        "rm -rf, upper", GROUP, "tree", shell("rm -rf untarred"), expect_gone("untarred"),
        before=shell("tar -xf $A/tree.tar"), copies_up=False,
    ),
    Workload("chmod -R", GROUP, "tree", shell("chmod -R g+w tree"), same_as_tree("tree")),
    Workload(
        "find cold", GROUP, "tree", shell("find tree -ls"), all_listed,
        cold=True, tool=("find", ".", "-ls"), changes=False, copies_up=False,
    ),
    Workload(
        "find warm", GROUP, "tree", shell("find tree -ls"), all_listed,
        before=shell("find tree -ls; find tree -ls"), changes=False, copies_up=False,
    ),
    Workload(
        "stat warm", GROUP, "tree", stat_all, all_stated, before=remember_names, changes=False, copies_up=False,
    ),
    Workload(
        "git status cold", GROUP, "repository", shell(STATUS), clean,
        before=shell(REFRESH), cold=True, tool=("git", "status"),
    ),
    Workload(
        "git status warm", GROUP, "repository", shell(STATUS), clean, before=shell(f"{REFRESH}; git status"),
    ),
    Workload(
        "list 100,000 entries, first", GROUP, "huge", list_huge, huge_listed, changes=False, copies_up=False,
    ),
    Workload(
        "list 100,000 entries, again", GROUP, "huge", list_huge, huge_listed, before=list_huge,
        changes=False, copies_up=False,
    ),
    Workload(
        "make and remove a tree 100 deep", GROUP, "empty", shell(f"mkdir -p {DEEP_PATH}; find deep; rm -r deep"),
        lambda trial: expect(trial.lines() == DEEP, "the tree was not as deep"), copies_up=False,
    ),
)  # fmt: skip
