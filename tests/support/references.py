"""Finds references in comments, docstrings and pages, and reports those that do not resolve.

A reference is a page (`docs/engine.md`, or `docs/engine.md, "The loop"`), a decision, another file of the repository, a
dotted name of a module or an attribute, a target of the Makefile, a campaign of docs/reliability.md, a Markdown link.
"""

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from fnmatch import filter as filter_names
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

PLACES = (".ci", ".github", "cli", "docs", "overlayfs", "scripts", "tests")

# Pages that comments may name without a path: those of the OCI image and distribution specifications.
FOREIGN_PAGES = {
    "annotations.md", "config.md", "descriptor.md", "image-index.md", "image-layout.md", "layer.md", "manifest.md",
    "manifest-v2-2.md", "media-types.md", "spec.md",
}  # fmt: skip

_OLD = re.compile(
    r"\b(?:cost|concurrency|conformance|demand|design|deviations|ecosystem|engine|faults|formats?|house|images"
    r"|performance|reliability|semantics|style), (?:D\d|C\d|sections? \d)"
    r"|\bengine notes\b|\bADRs? ?\d|\bdecisions?[ /]\d{4}\b(?!-)|\bD\d{1,2}\b(?=\))|/work/\w+|\breference/\w+\.md"
)
_PAGE = re.compile(r"(?<![\w/.-])(docs/[\w./-]+\.(?:md|txt|json|png))(?:[`)]*, \"([^\"]+)\")?")
_BARE_PAGE = re.compile(r"(?<![\w/.-])([\w-]+\.md)\b(?:[`)]*, \"([^\"]+)\")?")
_FILE = re.compile(r"(?<![\w/.~$*-])((?:\.ci|\.github|cli|overlayfs|scripts|tests)/[\w./*-]*[\w*])")
_MODULE_FILE = re.compile(r"(?<![\w/.*-])((?:[a-z_]\w*/)*[a-z_]\w*\.py)\b")
_DOTTED = re.compile(r"(?<![\w/.@-])((?:overlayfs|overlayfs_cli|tests)(?:\.[A-Za-z_]\w*)+)(?![\w/-])")
_TARGET = re.compile(r"(?:`|^|\s)make ([a-z][a-z0-9-]*)`")
_CAMPAIGN = re.compile(r"(?<![\w.'\"-])([TMC]\d{1,2})(?=[\s,.;:)]|$)")
_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)
_TERM = re.compile(r"^\| (?:\*\*)?([TMC]\d{1,2})(?:\*\*)? \||^- \*\*([TMC]\d{1,2})", re.MULTILINE)
_SUFFIXES = {"rst", "json", "sock", "toml", "service"}  # of a file name that looks like a dotted name


class Passage(NamedTuple):
    """A comment, a docstring (each on one line) or a page. `path` is a path in the repository."""

    path: str
    line: int
    text: str

    @property
    def is_page(self) -> bool:
        """Whether it is Markdown."""
        return self.path.endswith(".md")


class Fault(NamedTuple):
    """A reference that does not resolve, or has a form that is not allowed."""

    path: str
    line: int
    reference: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reference}"


def passages(root: Path = ROOT) -> Iterator[Passage]:
    """Yield every comment, docstring and page of the repository."""
    for path in sorted(_sources(root)):
        name, text = str(path.relative_to(root)), path.read_text()
        if path.suffix == ".md":
            yield Passage(name, 1, text)
        elif path.suffix == ".py" or (text.startswith("#!") and "python" in text.partition("\n")[0]):
            yield from of_python(name, text)
        else:
            yield from of_script(name, text)


def _sources(root: Path) -> Iterator[Path]:
    for directory in ("overlayfs", "cli", "tests", "scripts"):
        for path in (root / directory).rglob("*"):
            hidden = path.is_symlink() or {"golden", "__pycache__"} & set(path.parts)
            if not hidden and path.suffix in {"", ".py", ".md", ".sh"} and path.is_file():
                yield path
    yield from (root / "docs").rglob("*.md")
    yield from (root / "docs").glob("*.py")
    yield from root.glob("*.md")
    yield from root.glob(".github/**/*.md")
    yield from root.glob(".github/**/*.yml")
    for name in ("Makefile", "pyproject.toml", ".ci/run", ".pre-commit-config.yaml"):
        if (root / name).exists():
            yield root / name


def of_python(name: str, text: str) -> Iterator[Passage]:
    """Yield the docstrings of a module, and its comments; those on consecutive lines are one."""
    comments: list[str] = []
    last = 0
    starts_statement = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if comments and token.start[0] != last + 1:
                yield Passage(name, last - len(comments) + 1, " ".join(comments))
                comments = []
            comments.append(token.string.lstrip("#: ").rstrip())
            last = token.start[0]
        elif token.type == tokenize.STRING and starts_statement:
            yield Passage(name, token.start[0], " ".join(ast.literal_eval(token.string).split()))
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            starts_statement = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    if comments:
        yield Passage(name, last - len(comments) + 1, " ".join(comments))


def of_script(name: str, text: str) -> Iterator[Passage]:
    """Yield the comments of a shell script, a Makefile or a configuration."""
    for number, line in enumerate(text.splitlines(), 1):
        if comment := re.search(r"(?:^|\s)#+ ?(.*)", line):
            yield Passage(name, number, comment[1])


def faults(passage: Passage, root: Path = ROOT) -> Iterator[Fault]:
    """Yield the references of one passage that do not resolve."""
    checks = [_old_forms, _pages, _files, _dotted_names, _targets, _campaigns]
    text = passage.text
    if passage.is_page:
        yield from _links(passage, root)
        text = _LINK.sub(lambda link: " " * (link.end() - link.start()), text)
    for check in checks:
        for at, reference in check(text, root):
            yield Fault(passage.path, passage.line + text.count("\n", 0, at), reference)


Found = Iterator[tuple[int, str]]


def _old_forms(text: str, _: Path) -> Found:
    for match in _OLD.finditer(text):
        yield match.start(), f"{match[0]} (no form of a reference)"


def _pages(text: str, root: Path) -> Found:
    """Find pages, with a path or only a name, and the heading that follows."""
    for match in _PAGE.finditer(text):
        page = root / match[1]
        if not page.exists():
            yield match.start(), match[1]
        elif match[2] and _plain(match[2]) not in {_plain(heading) for heading in headings(page)}:
            yield match.start(), match[0]
    for match in _BARE_PAGE.finditer(text):
        places = [root / path for path in _ends(root).get(match[1], ())]
        if not places:
            if match[1] not in FOREIGN_PAGES:
                yield match.start(), match[1]
        elif match[2] and not any(_plain(match[2]) in map(_plain, headings(page)) for page in places):
            yield match.start(), match[0]


def _files(text: str, root: Path) -> Found:
    for match in _FILE.finditer(text):
        if match[1] not in _contents(root) and not filter_names(_contents(root), match[1]):
            yield match.start(), match[1]
    for match in _MODULE_FILE.finditer(text):
        if match[1] not in _ends(root):
            yield match.start(), match[1]


def _dotted_names(text: str, _: Path) -> Found:
    for match in _DOTTED.finditer(text):
        if match[1].rpartition(".")[2] not in _SUFFIXES and not resolves(match[1]):
            yield match.start(), match[1]


def _targets(text: str, root: Path) -> Found:
    for match in _TARGET.finditer(text):
        if match[1] not in _make_targets(root):
            yield match.start(1), f"make {match[1]}"


def _campaigns(text: str, root: Path) -> Found:
    for match in _CAMPAIGN.finditer(text):
        if match[1] not in _terms(root):
            yield match.start(), f"{match[1]} (not in docs/reliability.md)"


def _links(passage: Passage, root: Path) -> Iterator[Fault]:
    here = root / passage.path
    text = _FENCE.sub(lambda block: "\n" * block[0].count("\n"), passage.text)
    for match in _LINK.finditer(text):
        target, _, anchor = match[1].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        page = here.parent / target if target else here
        if not page.exists() or (anchor and page.suffix == ".md" and anchor not in anchors(page)):
            yield Fault(passage.path, 1 + text.count("\n", 0, match.start()), match[1])


# --- targets -----------------------------------------------------------------------------------------


@cache
def headings(page: Path) -> tuple[str, ...]:
    """Return the headings of a page as they are written."""
    return tuple(_HEADING.findall(_FENCE.sub("", page.read_text()))) if page.suffix == ".md" else ()


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and MyST make them."""
    found: set[str] = set()
    for heading in headings(page):
        slug = anchor = re.sub(r"[^\w\- ]", "", _plain(heading).lower()).replace(" ", "-")
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{slug}-{number}"
        found.add(anchor)
    return found


def _plain(heading: str) -> str:
    """Return a heading without markup: links lead by their words, code is its words."""
    return re.sub(r"[`*]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading))


@cache
def resolves(name: str) -> bool:
    """Return whether a dotted name is that of a module, or of something in one; annotated members count."""
    try:
        resolve_name(name)
    except ImportError:
        return False
    except AttributeError:
        owner, _, member = name.rpartition(".")
        try:
            found = resolve_name(owner)
        except (ImportError, AttributeError):
            return False
        return isinstance(found, type) and any(member in inspect.get_annotations(base) for base in found.mro())
    return True


@cache
def _contents(root: Path) -> frozenset[str]:
    """Return the paths of all files and directories that may be cited."""
    places = (path for name in PLACES for path in (root / name, *(root / name).rglob("*")))
    return frozenset(str(path.relative_to(root)) for path in (*places, *root.glob("*.*")) if path.exists())


@cache
def _ends(root: Path) -> dict[str, list[str]]:
    """Return what each path may be shortened to, from the left, with the paths that end so."""
    found: dict[str, list[str]] = {}
    for path in _contents(root):
        parts = path.split("/")
        for start in range(len(parts)):
            found.setdefault("/".join(parts[start:]), []).append(path)
    return found


@cache
def _make_targets(root: Path) -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][a-z0-9-]*):", (root / "Makefile").read_text(), re.MULTILINE))


@cache
def _terms(root: Path) -> frozenset[str]:
    """Return the numbers of the contract, the campaigns and the mutants."""
    page = (root / "docs/reliability.md").read_text()
    return frozenset({"T8"} | {first or second for first, second in _TERM.findall(page)})
