"""`overlayfs-mount`: the mount program of container engines and the helper of mount(8).

Every container operation starts it once to three times, so it parses by hand and imports only what mounting needs. It
has three callers:

- container engines: `overlayfs-mount -o OPTS MNT`
- /sbin/mount.fuse3: `overlayfs-mount SRC MNT -o OPTS`
- mount(8) through a link named /sbin/mount.fuse.overlayfs-mount: `SRC MNT [-sfnv] [-N NAMESPACE] [-t TYPE] -o OPTS`;
  only here -f means "fake" instead of "foreground"

Exit codes are those of mount(8): 0 mounted, 1 wrong usage, 2 system error, 32 not mounted.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from overlayfs import __version__
from overlayfs.errors import UsageError, UserError, one_line
from overlayfs.mount.options import Draft, MountOptions

PROGRAM = "overlayfs-mount"
WRONG_USAGE, SYSTEM_ERROR, NOT_MOUNTED = 1, 2, 32

HELP = f"""\
usage: {PROGRAM} [-f] [-d] -o OPTIONS MOUNTPOINT
       {PROGRAM} SOURCE MOUNTPOINT -o OPTIONS

Mount a stack of directories; the options are those of fuse-overlayfs and mount(8).

  -o OPTIONS          lowerdir=TOP:NEXT:...,upperdir=DIR,workdir=DIR and more, see overlayfs(1)
  -f, --foreground    stay in the foreground
  -d, --debug         log to standard error; implies -f
  -h, --help          show this text
  -V, --version       show the version

Example: {PROGRAM} -o lowerdir=/a:/b,upperdir=/u,workdir=/w /mnt
"""


@dataclass
class Invocation:
    """One command line, parsed. `options` are the values of all -o."""

    options: list[bytes] = field(default_factory=list)
    positionals: list[bytes] = field(default_factory=list)
    switches: set[str] = field(default_factory=set)
    namespace: bytes | None = None

    @property
    def source(self) -> bytes | None:
        """The source before the mount point, if there is one."""
        return self.positionals[0] if len(self.positionals) == 2 else None


def main() -> int:
    """Run the program with the arguments of the process; return its exit code."""
    try:
        return run(sys.argv[0], [os.fsencode(word) for word in sys.argv[1:]])
    except UserError as error:
        complain(str(error))
        return WRONG_USAGE if isinstance(error, UsageError) else NOT_MOUNTED
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # a defect too is one line and an exit code for the caller
        complain(f"{type(error).__name__}: {error}")
        return SYSTEM_ERROR


def complain(sentence: str) -> None:
    """Write one line to standard error, unless the caller has closed it."""
    if sys.stderr is not None:
        sys.stderr.write(f"{PROGRAM}: {one_line(sentence)}\n")


def run(program: str, words: list[bytes]) -> int:
    """Carry out a command line of `program`; return the exit code."""
    as_helper = os.path.basename(program).startswith("mount.")
    given = parse(words, as_helper)
    if given.switches & {"help", "version"}:
        sys.stdout.write(HELP if "help" in given.switches else _version())
        return 0
    if given.namespace is not None:
        _enter(given.namespace, program, words)
    options = mount_options(given)
    if "fake" in given.switches:
        return 0
    _mount(options, given.positionals[-1])
    return 0


def _version() -> str:
    return f"{PROGRAM} {__version__}\n"


def _mount(options: MountOptions, mountpoint: bytes) -> None:
    from overlayfs.mount import start

    start.mount(options, mountpoint)


def mount_options(given: Invocation) -> MountOptions:
    """Return the mount that the command line asks for. Unknown options are reported on standard error, and ignored."""
    if not 1 <= len(given.positionals) <= 2:
        raise UsageError(f"one mount point is needed, {len(given.positionals)} are given; see {PROGRAM} --help")
    draft = Draft(mount=_defaults(given))
    for text in given.options:
        draft.read(text)
    if draft.work is not None and draft.upper is None:
        complain("workdir is ignored, since there is no upperdir")
        draft.work = None
    if draft.unknown:
        complain(f"unknown options ignored: {', '.join(draft.unknown)}")
    return draft.build()


def _defaults(given: Invocation) -> dict[str, object]:
    """Return the defaults: containers run as other users, and need their set-uid programs and devices."""
    root = os.geteuid() == 0
    chosen: dict[str, object] = {"allow_other": root, "suid": root, "dev": root}
    if given.source is not None:
        chosen["source"] = given.source
    if given.switches & {"foreground", "debug"}:
        chosen.update(foreground=True, debug="debug" in given.switches)
    return chosen


def _enter(namespace: bytes, program: str, words: list[bytes]) -> None:
    """Run the program again in the mount namespace that mount(8) names, with nsenter(1) of the same package."""
    rest = _without_namespace(words)
    try:
        os.execvp("nsenter", [b"nsenter", b"--mount=" + namespace, b"--", os.fsencode(program), *rest])
    except OSError as error:
        raise UserError(f"cannot enter the namespace {os.fsdecode(namespace)}: nsenter: {error.strerror}") from None


def _without_namespace(words: list[bytes]) -> list[bytes]:
    at = next(index for index, word in enumerate(words) if word.startswith(b"-N"))
    return words[:at] + words[at + (2 if words[at] == b"-N" else 1) :]


# The parser.

_LONG = {b"--foreground": "foreground", b"--debug": "debug", b"--help": "help", b"--version": "version"}
_SHORT = {"f": "foreground", "d": "debug", "h": "help", "V": "version", "s": "", "n": "", "v": ""}
_SHORT_OF_HELPER = {**_SHORT, "f": "fake"}


def parse(words: list[bytes], as_helper: bool = False) -> Invocation:
    """Parse the words after the program's name. UsageError for an unknown flag."""
    given = Invocation()
    rest = iter(words)
    for word in rest:
        if word == b"--":
            given.positionals.extend(rest)
        elif word in _LONG:
            given.switches.add(_LONG[word])
        elif word.startswith(b"-") and word != b"-":
            _flags(given, word, rest, as_helper)
        else:
            given.positionals.append(word)
    return given


def _flags(given: Invocation, word: bytes, rest: Iterator[bytes], as_helper: bool) -> None:
    """Parse one word of short flags, `-sf` or `-oX`; the value of the last one may be the next word."""
    known = _SHORT_OF_HELPER if as_helper else _SHORT
    for at in range(1, len(word)):
        letter = chr(word[at])
        if letter in "oNt" and not word.startswith(b"--"):
            _valued(given, letter, word[at + 1 :] or next(rest, None))
            return
        if letter not in known:
            raise UsageError(f"unknown flag {os.fsdecode(word)}; see {PROGRAM} --help")
        given.switches.add(known[letter])


def _valued(given: Invocation, letter: str, value: bytes | None) -> None:
    if value is None:
        raise UsageError(f"flag -{letter} needs a value; see {PROGRAM} --help")
    if letter == "o":
        given.options.append(value)
    elif letter == "N":
        given.namespace = value
