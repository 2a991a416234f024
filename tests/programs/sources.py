"""Input for the programs, generated here so that no test needs a network."""

import base64
import hashlib
import itertools
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

LARGEST = 64 << 10
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def python_files(count: int) -> Iterator[tuple[Path, str]]:
    """Yield `count` real files with their names: the standard library, repeated as needed."""
    top = Path(sysconfig.get_path("stdlib"))
    found = [path for path in sorted(top.rglob("*")) if _is_wanted(path.relative_to(top), path)]
    rounds = (((path, turn) for path in found) for turn in itertools.count())
    for path, turn in itertools.islice(itertools.chain.from_iterable(rounds), count):
        yield path, f"tree/{turn}/{path.relative_to(top)}"


def _is_wanted(name: Path, path: Path) -> bool:
    plain = not path.is_symlink() and path.is_file() and path.stat().st_size <= LARGEST
    return plain and LEFT_OUT.isdisjoint(name.parts)


def write_tar(path: Path, files: Iterator[tuple[Path, str]]) -> None:
    """Write a tar with owners, modes, and times in fractions of a second."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number, (source, name) in enumerate(files):
            member = archive.gettarinfo(source, name)
            member.uid, member.gid, member.uname, member.gname = number % 3, number % 5, "", ""
            member.mtime = 1_500_000_000 + number + 0.125
            with open(source, "rb") as stream:
                archive.addfile(member, stream)


def write_wheel(directory: Path) -> Path:
    """Write the wheel of a package `tiny` with a module, data files and a console script."""
    path = directory / "tiny-1.0-py3-none-any.whl"
    contents = {
        "tiny/__init__.py": "def main():\n    print('tiny runs')\n",
        **{f"tiny/data/{number}.txt": f"{number}\n" for number in range(40)},
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny-1.0.dist-info/entry_points.txt": "[console_scripts]\ntiny = tiny:main\n",
    }
    record = "tiny-1.0.dist-info/RECORD"
    contents[record] = "".join(map(_record_line, contents.items())) + f"{record},,\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in contents.items():
            archive.writestr(name, text)
    return path


def _record_line(item: tuple[str, str]) -> str:
    name, text = item
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(text)}\n"


def write_project(directory: Path) -> None:
    """Write a small C project: a static library of many units, a generated header and a program."""
    directory.mkdir()
    units = range(20)
    (directory / "Makefile").write_text(MAKEFILE)
    for number in units:
        text = f'#include "all.h"\nint f{number}(int x) {{ return x * {number} + LIMIT; }}\n'
        (directory / f"f{number}.c").write_text(text)
    calls = " + ".join(f"f{number}(1)" for number in units)
    main = f'#include <stdio.h>\n#include "all.h"\nint main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
    (directory / "main.c").write_text(main)


MAKEFILE = """\
UNITS = $(filter-out main.c,$(wildcard *.c))
program: main.o libf.a
\t$(CC) -o $@ $^
libf.a: $(UNITS:.c=.o)
\tar rcs $@ $^
all.h: $(UNITS)
\tfor unit in $(UNITS:.c=); do echo "int $$unit(int);"; done >$@.new
\techo '#define LIMIT 3' >>$@.new
\tmv $@.new $@
%.o: %.c all.h
\t$(CC) -O0 -c -o $@ $<
clean:
\trm -f *.o *.a all.h program
"""


def write_package(directory: Path) -> Path:
    """Write what `dpkg-deb -b` packs: directories, programs, links of both kinds, setuid and sticky modes."""
    top = directory / "package"
    for name in ("DEBIAN", "usr/bin", "usr/lib/deb", "etc/deb", "var/tmp"):
        (top / name).mkdir(parents=True)
    (top / "DEBIAN/control").write_text(CONTROL)
    for number in range(300):
        (top / f"usr/lib/deb/part{number}").write_text(f"part {number}\n" * number)
    (top / "usr/bin/run").write_text("#!/bin/sh\necho deb runs\n")
    (top / "usr/bin/run").chmod(0o4755)
    (top / "usr/bin/also").hardlink_to(top / "usr/bin/run")
    (top / "usr/lib/latest").symlink_to("deb/part299")
    (top / "etc/deb/conf").write_text("from the package\n")
    (top / "var/tmp").chmod(0o1777)
    return top


CONTROL = """\
Package: deb
Version: 1.0
Architecture: all
Maintainer: Nobody <nobody@example.org>
Description: a package for a test
"""
