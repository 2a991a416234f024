"""The content of the layers: the same on every machine and in every run, by a fixed random seed."""

import os
import random
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.site import Site, run
from bench.sizes import Sizes

LAYERS = ("top", "middle", "base")  # top first
SHARES = (10, 20, 70)  # percent of the files in each of them
OVERRIDDEN = 5  # percent of the files of the upper two layers that are also, older, in the base
WORDS = ("layer", "upper", "lower", "mount", "copy", "write", "read", "rename", "whiteout", "stage", "node", "name")
DEPTH = "depth-"  # and the number of layers
DEPTH_FILES = 1000
OLD = 1_600_000_000  # seconds; the times of all prepared files, older than anything a program compares them with


def text(generator: random.Random, size: int) -> bytes:
    """Return lines of words of about `size` bytes."""
    line = " ".join(generator.choices(WORDS, k=9)) + "\n"
    lines = [f"{number} {line}" for number in range(size // len(line) + 1)]
    return "".join(lines).encode()[:size]


def sizes(generator: random.Random, count: int) -> Iterator[int]:
    """Return a size as in source trees: half of the files are below 3 KB, a few have 100 KB."""
    for _ in range(count):
        yield min(int(generator.lognormvariate(8, 1.2)), 256 << 10)


def write(path: Path, data: bytes) -> None:
    """Write a file, and the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def tree_names(generator: random.Random, files: int, directories: int) -> list[str]:
    """Return paths of files in directories up to six deep."""
    places = ["tree"]
    while len(places) < directories:
        parent = generator.choice(places)
        if parent.count("/") < 6:
            places.append(f"{parent}/d{len(places)}")
    return [f"{generator.choice(places)}/f{number}.txt" for number in range(files)]


def fill_tree(whole: Path, sizes_of: Sizes) -> None:
    """Make a tree of text files."""
    generator = random.Random(1)
    names = tree_names(generator, sizes_of.files, sizes_of.directories)
    for name, size in zip(names, sizes(generator, len(names)), strict=True):
        write(whole / name, text(generator, size))


def fill_repository(whole: Path, sizes_of: Sizes) -> None:
    """Make a git repository with one commit of a source tree."""
    generator = random.Random(2)
    names = tree_names(generator, sizes_of.repository, sizes_of.repository // 15)
    for name, size in zip(names, sizes(generator, len(names)), strict=True):
        write(whole / "repository" / name, text(generator, size))
    git = ("git", "-c", "user.name=bench", "-c", "user.email=bench@localhost", "-C", whole / "repository")
    run(*git, "init", "-q")
    run(*git, "add", "-A")
    run(*git, "commit", "-qm", "all")
    run(*git, "gc", "-q")


def fill_modules(whole: Path, sizes_of: Sizes) -> None:
    """Make Python packages of ten modules each, compiled, and one that imports them all."""
    generator = random.Random(3)
    names = [f"package{number // 10}.module{number}" for number in range(sizes_of.modules)]
    for name in names:
        package, _, module = name.partition(".")
        write(whole / "modules" / package / "__init__.py", b"")
        functions = [f"def function{n}(value):\n    return value + {n}\n" for n in range(generator.randrange(5, 60))]
        write(whole / "modules" / package / f"{module}.py", "\n".join(functions).encode())
    imports = "".join(f"import {name}\n" for name in names) + f"print({len(names)})\n"
    write(whole / "modules/everything.py", imports.encode())
    age(whole)  # before they are compiled: a compiled module carries the time of its source
    run(sys.executable, "-m", "compileall", "-q", whole / "modules")


def fill_project(whole: Path, sizes_of: Sizes) -> None:
    """Make a C project with a Makefile."""
    project = whole / "project"
    names = [f"part{number}" for number in range(sizes_of.sources)]
    for number, name in enumerate(names):
        body = "".join(f"int {name}_{n}(int x) {{ return x * {n} + {number}; }}\n" for n in range(20))
        write(project / f"{name}.c", f'#include "{name}.h"\n#include <stdio.h>\n{body}'.encode())
        declared = "".join(f"int {name}_{n}(int x);\n" for n in range(20))
        write(project / f"{name}.h", declared.encode())
    calls = " + ".join(f"{name}_1({number})" for number, name in enumerate(names))
    headers = "".join(f'#include "{name}.h"\n' for name in names)
    write(project / "main.c", f'#include <stdio.h>\n{headers}int main(void) {{ printf("%d\\n", {calls}); }}\n'.encode())
    objects = " ".join(f"{name}.o" for name in ["main", *names])
    rules = f"program: {objects}\n\t$(CC) -o $@ {objects}\n%.o: %.c\n\t$(CC) -O0 -c $<\n"
    write(project / "Makefile", rules.encode())


def fill_empty(whole: Path, sizes_of: Sizes) -> None:
    """Make almost nothing: for workloads that bring their own files."""
    write(whole / "readme", b"nothing else\n")


def fill_data(whole: Path, sizes_of: Sizes) -> None:
    """Make one file of many blocks."""
    _random_file(whole / "data", sizes_of.blocks << 20)


def _random_file(path: Path, size: int) -> None:
    block = os.urandom(min(size, 1 << 20))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.writelines(block[: min(1 << 20, size - at)] for at in range(0, size, 1 << 20))


def fill_huge(whole: Path, sizes_of: Sizes) -> None:
    """Make one directory of many files."""
    (whole / "huge").mkdir(parents=True)
    for number in range(sizes_of.huge):
        (whole / f"huge/{number:07}").touch()


def fill_nodes(whole: Path, sizes_of: Sizes) -> None:
    """Make very many empty files, a thousand to a directory."""
    for first in range(0, sizes_of.nodes, 1000):
        directory = whole / f"nodes/{first // 1000}"
        directory.mkdir(parents=True)
        for number in range(first, min(first + 1000, sizes_of.nodes)):
            os.close(os.open(directory / str(number), os.O_CREAT | os.O_WRONLY, 0o644))


FILL: dict[str, Callable[[Path, Sizes], None]] = {
    "tree": fill_tree,
    "repository": fill_repository,
    "modules": fill_modules,
    "project": fill_project,
    "empty": fill_empty,
    "data": fill_data,
    "huge": fill_huge,
}


def prepare(site: Site, content: str) -> None:
    """Put one content on a site, as three layers and as one plain tree `whole`, unless it is there already."""
    if content in site.made:
        return
    if content.startswith(DEPTH):
        fill_depth(site.layers(content), len(lowers(content)))
    elif content == "nodes":  # one layer only: a million files are enough once
        fill_nodes(site.layers(content) / "whole", site.sizes)
    else:
        _fill_layers(site.layers(content), content, site.sizes)
    for asset in ASSETS.get(content, ()):
        asset(site)
    site.made.add(content)


def _fill_layers(place: Path, content: str, sizes_of: Sizes) -> None:
    FILL[content](place / "whole", sizes_of)
    if content != "modules":
        age(place / "whole")
    split(place / "whole", place)


def make_archive(site: Site) -> None:
    """Make the archive of the tree that is unpacked."""
    whole = site.layers("tree") / "whole"
    run("tar", "-C", whole, "-cf", site.assets / "tree.tar", "--transform", "s/^tree/untarred/", "tree")


def age(whole: Path) -> None:
    """Set all times to the same old value: programs reread files that are as new as their index or compiled form."""
    for path in [whole, *whole.rglob("*")]:
        os.utime(path, (OLD, OLD), follow_symlinks=False)


def split(whole: Path, place: Path) -> None:
    """Distribute the files of a tree over three layers, so that directories are merged and some files are hidden."""
    generator = random.Random(4)
    for layer in LAYERS:
        (place / layer).mkdir()
    for path in sorted(whole.rglob("*")):
        name = path.relative_to(whole)
        if path.is_dir():
            (place / "base" / name).mkdir()
        else:
            layer = generator.choices(LAYERS, SHARES)[0]
            _deal(path, place / layer / name)
            if layer != "base" and generator.randrange(100) < OVERRIDDEN:
                write(place / "base" / name, b"hidden by a layer above\n")
    for layer in LAYERS:
        _copy_directory_times(whole, place / layer)


def _deal(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def _copy_directory_times(whole: Path, layer: Path) -> None:
    for path in layer.rglob("*"):
        if path.is_dir():
            shutil.copystat(whole / path.relative_to(layer), path)


def make_wheels(site: Site) -> None:
    """Make wheels of pure Python, complete enough for pip: no index and no network is needed to install them."""
    target = site.assets / "wheels"
    target.mkdir()
    for number in range(site.sizes.wheels):
        _make_wheel(target, f"bench{number}", site.sizes.wheel_files)


def _make_wheel(target: Path, name: str, files: int) -> None:
    information = f"{name}-1.0.dist-info"
    members = {f"{name}/part{n}.py": f"def answer():\n    return {n}\n" * 5 for n in range(files)}
    members[f"{name}/__init__.py"] = ""
    members[f"{information}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    members[f"{information}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: bench\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{member},,\n" for member in [*members, f"{information}/RECORD"])
    with zipfile.ZipFile(target / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for member, data in {**members, f"{information}/RECORD": record}.items():
            archive.writestr(member, data)


def fill_depth(place: Path, layers: int) -> None:
    """Make many layers that share one directory, with a fixed number of files distributed over them."""
    for number in range(DEPTH_FILES):
        write(place / f"{number % layers}/shared/{number:05}", b"x")
        write(place / f"whole/shared/{number:05}", b"x")
    for number in range(layers):
        (place / f"{number}/shared").mkdir(parents=True, exist_ok=True)


def lowers(content: str) -> tuple[str, ...]:
    """Return the names of the layers of a content, top first."""
    if content.startswith(DEPTH):
        return tuple(str(number) for number in range(int(content.removeprefix(DEPTH))))
    return ("whole",) if content == "nodes" else LAYERS


ASSETS: dict[str, tuple[Callable[[Site], None], ...]] = {"tree": (make_archive,), "empty": (make_wheels,)}
