"""The house: which room may import which, where waiting is allowed, and where the outside world is touched."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "overlayfs"

BELOW_TREE = {"union", "format", "sysio", "errors"}
BELOW_FS = BELOW_TREE | {"tree"}

# room -> (rooms it may import, the reason)
ALLOWED: dict[str, tuple[set[str], str]] = {
    "errors": (set(), "the words for failure are used by everybody and so know nobody"),
    "sysio": ({"errors"}, "system calls: values in, values out; it must not know what they are for"),
    "format": ({"errors"}, "pure: a format that could look at a disk could not be tested on bytes alone"),
    "union": ({"format", "errors"}, "pure: rules decide from facts, others collect the facts and act"),
    "tree": (BELOW_TREE, "one layer as an object; it does not know that there are nodes, or other layers"),
    "fs": (BELOW_FS, "the meaning of the overlay, usable from Python without a mount"),
    "store": (
        BELOW_FS | {"fs"},
        "layers at rest; a commit asks fs what a stack shows, fs knows none at rest",
    ),
    "oci": (
        BELOW_FS | {"fs", "store"},
        "layers on their way to and from other programs, which the store knows not",
    ),
    "library": (BELOW_FS | {"fs", "store", "oci"}, "the store with all that can be done to it, without a mount"),
    "fuse": (BELOW_FS | {"__init__", "fs", "store"}, "translates requests; what they mean is said below"),
    "mount": (
        BELOW_FS | {"__init__", "fs", "store", "oci", "library", "fuse"},
        "the life of one mount, from the lock to the unmount",
    ),
    "__init__": (BELOW_FS | {"fs", "library"}, "what users of the library see: the overlay without a mount, the store"),
}

# module from outside -> (rooms or files that may import it, the reason)
CONFINED: dict[str, tuple[set[str], str]] = {
    "pyfuse3": (
        {"fuse/pyfuse3/engine.py", "fuse/pyfuse3/handlers.py"},
        "the kernel engine must run where pyfuse3 is missing",
    ),
    "trio": ({"fuse", "mount"}, "only what waits is async; all else can be called from anywhere"),
    "isal": ({"oci/compression.py"}, "bytes that depend on a library are made in one place"),
    "backports": ({"oci/compression.py"}, "Python 3.14 has it under another name"),
    "urllib3": ({"oci/http_client.py"}, "one place decides which host sees a secret, and what is tried again"),
    "asyncio": (set(), "one event loop is enough"),
    "ctypes": (
        {"sysio", "mount"},
        "raw system calls on layers have one door; mounting itself is not one on a layer",
    ),
    "overlayfs_cli": (set(), "the library does not know its command line"),
    "click": (set(), "parsing of arguments belongs to the command line"),
}

PURE = ("format", "union")
PURE_MODULES = {
    "binascii", "collections", "collections.abc", "dataclasses", "enum", "errno", "functools", "hashlib", "itertools",
    "operator", "os", "re", "stat", "string", "struct", "sys", "types", "typing", "xxhash", "zlib",
}  # fmt: skip
PURE_OS_FUNCTIONS = {"fsdecode", "fsencode", "major", "makedev", "minor", "strerror"}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _imports_from(path, node)


def _imports_from(path: Path, node: ast.ImportFrom) -> Iterator[str]:
    assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the room they lead to"
    module = node.module or ""
    if module == "overlayfs":
        yield from (f"overlayfs.{alias.name}" for alias in node.names)
    else:
        yield module


def _room_of(module: str) -> str:
    name = (module + ".__init__").split(".")[1]
    return name if name in ALLOWED else "__init__"  # from overlayfs import Overlay


def _ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_source = pytest.mark.parametrize("path", SOURCES, ids=_ids)


def test_every_room_has_a_row() -> None:
    assert {_room(path) for path in SOURCES} <= set(ALLOWED)


def test_rows_lead_downwards() -> None:
    for room, (below, _) in ALLOWED.items():
        for other in below:
            assert room not in ALLOWED[other][0], f"{room} and {other} import each other"
            assert ALLOWED[other][0] < below or other in ("store", "__init__") or room == "__init__", (
                f"{room} skips what {other} uses"
            )


@every_source
def test_imports_lead_downwards(path: Path) -> None:
    room = _room(path)
    allowed, reason = ALLOWED[room]
    for module in _imports(path):
        if module == "overlayfs" or module.startswith("overlayfs."):
            other = _room_of(module)
            assert other == room or other in allowed, f"{room} imports {module}; {reason}"


@every_source
def test_confined_modules_stay_confined(path: Path) -> None:
    inside = path.relative_to(PACKAGE)
    for module in _imports(path):
        places, reason = CONFINED.get(module.split(".")[0], (None, ""))
        if places is not None:
            assert str(inside) in places or inside.parts[0] in places, f"{inside} imports {module}; {reason}"


@every_source
def test_waiting_happens_only_in_engines_and_mounts(path: Path) -> None:
    waiting = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    if _room(path) not in ("fuse", "mount"):
        found = [node.lineno for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, waiting)]
        assert not found, f"waits in lines {found}"


@pytest.mark.parametrize("path", [path for path in SOURCES if _room(path) in PURE], ids=_ids)
def test_rules_and_formats_are_pure(path: Path) -> None:
    for module in _imports(path):
        assert module.startswith("overlayfs.") or module in PURE_MODULES, f"imports {module}"
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr.isupper() or node.attr in PURE_OS_FUNCTIONS, f"line {node.lineno} asks the system"


def test_nothing_imports_the_directory_cli() -> None:
    """It installs as overlayfs_cli; `import cli` would work in a checkout and nowhere else."""
    for folder in ("overlayfs", "cli", "tests", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "cli" not in {module.split(".")[0] for module in _imports(path)}, path


def test_sysio_is_imported_whole() -> None:
    """A call that tests replace has one name, `sysio.NAME`; only the package and its own test see the parts."""
    own = (PACKAGE / "sysio", ROOT / "tests" / "unit" / "test_sysio.py")
    for folder in ("overlayfs", "cli", "tests", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            if not any(path.is_relative_to(place) for place in own):
                assert not [module for module in _imports(path) if module.startswith("overlayfs.sysio.")], path
                assert "overlayfs.sysio" not in _from_imports(path), f"{path}: from overlayfs import sysio"


def _from_imports(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_bytes()))
    return [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]


def test_the_walk_sees_what_it_forbids(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text("import cli.main\nfrom overlayfs import fs\nfrom overlayfs.tree.layer import Layer\n")
    assert list(_imports(source)) == ["cli.main", "overlayfs.fs", "overlayfs.tree.layer"]
    source.write_text("from . import fs\n")
    with pytest.raises(AssertionError, match="relative"):
        list(_imports(source))
