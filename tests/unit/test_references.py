"""Every reference in comments, docstrings and pages resolves; the check itself finds one that does not."""

import re
from pathlib import Path

import pytest

from tests.support import references
from tests.support.references import ROOT, Passage

DECISIONS = ROOT / "docs/decisions"


def test_every_reference_leads_somewhere() -> None:
    found = [str(fault) for passage in references.passages() for fault in references.faults(passage)]
    assert found == []


def test_decisions_are_numbered_without_gaps_and_listed() -> None:
    pages = sorted(path.name for path in DECISIONS.glob("[0-9]*.md"))
    assert [int(name[:4]) for name in pages] == list(range(1, len(pages) + 1))
    index = (DECISIONS / "index.md").read_text()
    assert re.findall(r"\]\((\d{4}-[a-z-]+\.md)\)", index) == pages
    for name in pages:
        assert (DECISIONS / name).read_text().startswith(f"# {name[:4]}: ")


@pytest.mark.parametrize(
    "planted",
    [
        "docs/nothing.md",
        "nothing.md",
        'docs/engine.md, "Nothing of the kind"',
        'engine.md, "Nothing of the kind"',
        "docs/decisions/0006-engine-in-rust.md",
        "docs/decisions/0099-nothing.md",
        "tests/unit/test_nothing.py",
        "overlayfs/fs/nothing.py",
        "scripts/nothing",
        "tests/unit/test_nothing_*.py",
        "fs/nothing.py",
        "overlayfs.fs.nothing",
        "overlayfs.fs.overlay.Overlay.nothing",
        "tests.support.references.nothing",
        "`make nothing`",
        "T99",
        "M55",
        "C9",
        "design, D9",
        "formats, section 10",
        "semantics, sections 3 and 8",
        "ecosystem, section 1",
        "reliability, section 1",
        "reliability, C3",
        "engine notes",
        "ADR 0006",
        "decision 0006",
        "decisions/0006",
        "/work/shared",
        "reference/style.md",
    ],
)
@pytest.mark.parametrize("form", ["{}", "The rule ({}) stands.", "See {}, and look twice.", "as {}: so it is"])
def test_a_planted_fault_is_found(planted: str, form: str) -> None:
    [found, *_] = references.faults(Passage("overlayfs/planted.py", 7, form.format(planted)))
    assert found.path == "overlayfs/planted.py" and found.line == 7
    assert found.reference.split(" (")[0].removesuffix(")") in planted.strip("`")


@pytest.mark.parametrize(
    "good",
    [
        "docs/engine.md",
        'docs/engine.md, "The loop"',
        '`docs/engine.md`, "The loop"',
        "docs/decisions/0006-engine-in-python.md",
        "tests/unit/test_references.py",
        "tests/unit/test_*.py",
        "fs/overlay.py",
        "overlayfs.Overlay",
        "overlayfs.fs.overlay.Overlay.lookup",
        "overlayfs.fuse.engine.MountSettings.source",
        "OCI image-spec `layer.md`",
        "fs/overlayfs/super.c of the kernel, Documentation/filesystems/overlayfs.rst",
        "/run/overlayfs/nothing, ~/.local/share/overlayfs/store",
        "`make check`",
        "T13, T8, M4 and C2 (of docs/reliability.md)",
        "https://example.org/docs/nothing.md",
    ],
)
def test_a_reference_that_resolves_is_no_fault(good: str) -> None:
    assert [*references.faults(Passage("overlayfs/planted.py", 1, f"As in {good}, and more."))] == []


def test_links_of_a_page(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "Makefile").touch()
    (tmp_path / "docs/reliability.md").touch()
    (tmp_path / "docs/other.md").write_text("# Other `x`\n\n## Twice\n\n## Twice\n\n```\n## No heading\n```\n")
    page = (
        "# Here\n\n[a](other.md) [b](other.md#other-x) [c](other.md#twice-1) [d](#here) [e](https://example.org/x.md)\n"
        "[f](nothing.md)\n[g](other.md#nothing)\n\n```\n[h](nothing.md)\n```\n[i](other.md#no-heading) ![j](p.png)\n"
        "[k](other.md#twice-2)\n[l](#other)\n"
    )
    (tmp_path / "docs/here.md").write_text(page)
    found = [*references.faults(Passage("docs/here.md", 1, page), tmp_path)]
    assert [(fault.line, fault.reference) for fault in found] == [
        (4, "nothing.md"),
        (5, "other.md#nothing"),
        (10, "other.md#no-heading"),
        (10, "p.png"),
        (11, "other.md#twice-2"),
        (12, "#other"),
    ]


def test_comments_and_docstrings_are_read_whole() -> None:
    source = (
        '"""A module: docs/engine.md,\n"The loop"."""\n\n# One comment over\n# two lines.\n\nX = 1  # another\n'
        '"""What X is."""\n\nY = "no comment # at all"\n\n\nclass C:\n    """A class."""\n\n    def f(self):\n'
        '        """A function."""\n        # inside\n'
    )
    found = sorted((passage.line, passage.text) for passage in references.of_python("m.py", source))
    assert found == [
        (1, 'A module: docs/engine.md, "The loop".'),
        (4, "One comment over two lines."),
        (7, "another"),
        (8, "What X is."),
        (14, "A class."),
        (17, "A function."),
        (18, "inside"),
    ]
    assert [*references.of_script("s", "#!/bin/sh\nrun it  # why\n")] == [
        Passage("s", 1, "!/bin/sh"),
        Passage("s", 2, "why"),
    ]


def test_the_repository_is_read() -> None:
    read = {passage.path for passage in references.passages()}
    assert {"README.md", "docs/engine.md", "overlayfs/fs/overlay.py", "scripts/campaign", "Makefile"} <= read
