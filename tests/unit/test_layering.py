"""The layers of the code: allowed imports, confined third-party modules, pure packages, sizes of modules."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "overlayfs"

BELOW_TREE = {"union", "format", "sysio", "errors"}
BELOW_FS = BELOW_TREE | {"tree"}

# package or module of overlayfs -> (those it may import, the reason)
ALLOWED: dict[str, tuple[set[str], str]] = {
    "errors": (set(), "used by all, so it may use none"),
    "sysio": ({"errors"}, "system calls: values in, values out, whatever they are for"),
    "format": ({"errors"}, "pure: tests need only bytes"),
    "union": ({"format", "errors"}, "pure: rules decide from facts that others collect"),
    "tree": (BELOW_TREE, "one layer as an object, independent of nodes and of other layers"),
    "fs": (BELOW_FS, "the meaning of the overlay, usable from Python without a mount"),
    "store": (
        BELOW_FS | {"fs"},
        "layers at rest; a commit needs the merged tree of a stack, fs needs no store",
    ),
    "oci": (
        BELOW_FS | {"fs", "store"},
        "exchange of layers with other programs, of which the store is independent",
    ),
    "library": (BELOW_FS | {"fs", "store", "oci"}, "the public API of the store"),
    "fuse": (BELOW_FS | {"__init__", "fs", "store"}, "translates requests; their meaning is in the packages below"),
    "mount": (
        BELOW_FS | {"__init__", "fs", "store", "oci", "library", "fuse"},
        "the lifetime of one mount, from the lock to the unmount",
    ),
    "__init__": (BELOW_FS | {"fs", "library"}, "the public API: the overlay without a mount, and the store"),
}

# third-party or standard module -> (packages or files that may import it, the reason)
CONFINED: dict[str, tuple[set[str], str]] = {
    "pyfuse3": (
        {"fuse/pyfuse3/engine.py", "fuse/pyfuse3/handlers.py"},
        "the kernel engine must run where pyfuse3 is missing",
    ),
    "trio": ({"fuse", "mount"}, "only code that waits is async; everything else can be called from anywhere"),
    "isal": ({"oci/compression.py"}, "output that depends on the version of a library is produced in one place"),
    "backports": ({"oci/compression.py"}, "Python 3.14 has it under another name"),
    "urllib3": ({"oci/http_client.py"}, "one place decides which host gets a secret, and what is retried"),
    "asyncio": (set(), "one event loop is enough"),
    "ctypes": (
        {"sysio", "mount"},
        "system calls on layers are in one package; mounting is not a call on a layer",
    ),
    "overlayfs_cli": (set(), "the library is independent of its command line"),
    "click": (set(), "parsing of arguments belongs to the command line"),
}

PURE = ("format", "union")
PURE_MODULES = {
    "binascii", "collections", "collections.abc", "dataclasses", "enum", "errno", "functools", "hashlib", "itertools",
    "operator", "os", "re", "stat", "string", "struct", "sys", "types", "typing", "xxhash", "zlib",
}  # fmt: skip
PURE_OS_FUNCTIONS = {"fsdecode", "fsencode", "major", "makedev", "minor", "strerror"}

SHORTEST, LONGEST = 40, 600  # lines of a module, without a reason to be another size

# module -> the reason why it is shorter than SHORTEST lines
SHORT = {
    "cli/command.py": "helpers of all commands that only click needs",
    "cli/push.py": "one module per command",
    "cli/tag.py": "one module per command",
    "overlayfs/__init__.py": "the names of the public API",
    "overlayfs/format/metacopy.py": "one module per mark of the format",
    "overlayfs/format/nlink.py": "one module per mark of the format",
    "overlayfs/format/opaque.py": "one module per mark of the format",
    "overlayfs/fs/core.py": "the parts of an overlay that its verbs share, in one value",
    "overlayfs/fuse/request_log.py": "used by both engines",
    "overlayfs/sysio/capabilities.py": "the only part that is about the process, not about files",
}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def _package(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _imports_from(path, node)


def _imports_from(path: Path, node: ast.ImportFrom) -> Iterator[str]:
    assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the package they lead to"
    module = node.module or ""
    if module == "overlayfs":
        yield from (f"overlayfs.{alias.name}" for alias in node.names)
    else:
        yield module


def _package_of(module: str) -> str:
    name = (module + ".__init__").split(".")[1]
    return name if name in ALLOWED else "__init__"  # from overlayfs import Overlay


def _ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_source = pytest.mark.parametrize("path", SOURCES, ids=_ids)


def test_every_package_has_a_row() -> None:
    assert {_package(path) for path in SOURCES} == set(ALLOWED)


def test_rows_lead_downwards() -> None:
    for package, (below, _) in ALLOWED.items():
        for other in below:
            assert package not in ALLOWED[other][0], f"{package} and {other} import each other"
            assert ALLOWED[other][0] < below or other in ("store", "__init__") or package == "__init__", (
                f"{package} may not import all that {other} imports"
            )


@every_source
def test_imports_lead_downwards(path: Path) -> None:
    package = _package(path)
    allowed, reason = ALLOWED[package]
    for module in _imports(path):
        if module == "overlayfs" or module.startswith("overlayfs."):
            other = _package_of(module)
            assert other == package or other in allowed, f"{package} imports {module}; {reason}"


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
    if _package(path) not in ("fuse", "mount"):
        found = [node.lineno for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, waiting)]
        assert not found, f"waits in lines {found}"


@pytest.mark.parametrize("path", [path for path in SOURCES if _package(path) in PURE], ids=_ids)
def test_rules_and_formats_are_pure(path: Path) -> None:
    for module in _imports(path):
        assert module.startswith("overlayfs.") or module in PURE_MODULES, f"imports {module}"
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr.isupper() or node.attr in PURE_OS_FUNCTIONS, f"line {node.lineno} makes a system call"


def test_the_directory_cli_is_not_imported() -> None:
    """It is installed as overlayfs_cli; `import cli` would work only in a checkout."""
    for folder in ("overlayfs", "cli", "tests", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "cli" not in {module.split(".")[0] for module in _imports(path)}, path


def test_modules_are_neither_tiny_nor_huge() -> None:
    """Few files to open, none of them endless. A package without code has only a docstring."""
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (*SOURCES, *(ROOT / "cli").rglob("*.py"))
        if path.name != "__init__.py" or len(ast.parse(path.read_bytes()).body) > 1
    }
    short = {name for name, lines in sizes.items() if lines < SHORTEST}
    assert short == set(SHORT), f"without a reason: {short - set(SHORT)}; no longer short: {set(SHORT) - short}"
    assert {name for name, lines in sizes.items() if lines > LONGEST} == set()


def test_programs_without_a_suffix_are_linted_and_typed() -> None:
    """ruff and mypy do not find them by themselves."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    programs = {
        f"scripts/{path.name}"
        for path in (ROOT / "scripts").iterdir()
        if path.is_file() and not path.suffix and "python" in path.read_text().partition("\n")[0]
    }
    assert programs == {name for name in settings["ruff"]["extend-include"] if name.startswith("scripts/")}
    assert programs == {name for name in settings["mypy"]["files"] if (ROOT / name).is_file()}


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


def test_the_scan_finds_imports(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text("import cli.main\nfrom overlayfs import fs\nfrom overlayfs.tree.layer import Layer\n")
    assert list(_imports(source)) == ["cli.main", "overlayfs.fs", "overlayfs.tree.layer"]
    source.write_text("from . import fs\n")
    with pytest.raises(AssertionError, match="relative"):
        list(_imports(source))
