"""Running the five actions on one entry of the corpus: time and memory taken, and violations."""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from overlayfs.errors import UserError
from tests.hostile import actions
from tests.hostile.canary import Canary
from tests.hostile.corpus import CORPUS, Hostile
from tests.hostile.forms import Archive, Directory, Form, Outside, Stack
from tests.support import processes, serving, syscalls
from tests.support.fork_server import DiedError, ForkServer, HungError
from tests.support.serving import MountSpec

T = TypeVar("T")
ACTIONS = ("import", "stack", "read", "copy-up", "commit")
MEMORY = 256 << 20
"""Bytes of resident memory, with the interpreter, that an action may take, and the daemon during all of them."""
MODULES = ("tests.hostile.actions", "tests.support.serving", "overlayfs.mount.daemon", "overlayfs.mount.live_commit",
           "overlayfs.fuse.kernel.engine", "overlayfs.fuse.pyfuse3.engine", "overlayfs.oci.image_import",
           "overlayfs.oci.image_export", "overlayfs.store.commit")  # fmt: skip
_DETACH = 2
_HANG = 12  # timeout of an action, as a multiple of its CPU time, for busy machines
_COMPLAINTS = ("Traceback", " ERROR: ", " CRITICAL: ")


class Taken(NamedTuple):
    """What one action took at most: seconds of CPU time, with the daemon's, and bytes of memory."""

    seconds: float
    memory: int


class Trial:
    """Runs entries in `place`. taken: what each (number, action) took. violations: messages.

    full: at full size. every: mount every form that is accepted, not only those made by hand. mutant: the planted bug
    of the import, the stack and the daemon.
    """

    def __init__(
        self,
        place: Path,
        fork_server: ForkServer,
        engine: str,
        full: bool = False,
        every: bool = False,
        mutant: str | None = None,
    ) -> None:
        self.place = place
        self.fork_server = fork_server
        self.full = full
        self.every = every
        self.engine = engine
        self.mutant = mutant
        self.canary = Canary(place / "canary")
        self.outside = Outside(os.fsencode(self.canary.path), full)
        self.taken: dict[tuple[int, str], Taken] = {}
        self.violations: list[str] = []
        self.forms = 0

    def run(self, number: int, wanted: Sequence[str] = ACTIONS) -> None:
        """Run one entry in all its forms."""
        hostile = CORPUS[number]
        forms = list(hostile.objects(self.outside))
        mounted = [form for form in forms if isinstance(form, Stack)] or forms
        for form in forms:
            self.forms += 1
            attempt = _Attempt(self, hostile, form)
            try:
                attempt.run(wanted if self.every or form in mounted else wanted[:1])
            finally:
                attempt.clear()


class _Attempt:
    """One form."""

    def __init__(self, trial: Trial, hostile: Hostile, form: Form) -> None:
        self._trial = trial
        self._hostile = hostile
        self._form = form
        self._name = f"form{trial.forms}"
        self._place = trial.place / self._name
        self._place.mkdir()
        self._store = os.fsencode(self._place / "store")
        self._point = self._place / "m"
        self._point.mkdir()
        self._pid: int | None = None
        self._before: object = None

    # --- the five -------------------------------------------------------------------------------------------

    def run(self, wanted: Sequence[str]) -> None:
        there = self._import_stack(self._form) if isinstance(self._form, Stack) else self._import(self._form)
        if not there or "stack" not in wanted:
            return
        self._pid = self._do("stack", serving.serve, self._spec())
        if self._pid is None:
            return
        shows = self._form.shows if isinstance(self._form, Stack) else {}
        self._walk("read", actions.read, shows)
        if "copy-up" in wanted:
            self._walk("copy-up", actions.copy_up)
        if "commit" in wanted:
            self._commit()
        else:
            self._end()

    def _import(self, form: Archive | Directory) -> bool:
        """Import it; return whether there is an image now."""
        source = self._place / "source"
        if isinstance(form, Directory):
            source.mkdir()
            form.build(source)
        else:
            with open(source, "wb") as stream:
                stream.writelines(form.pieces())
        sentence = self._do("import", actions.import_, self._store, os.fsencode(source), "image")
        if sentence is not None:
            self._judge(form, sentence)
        return sentence == ""

    def _judge(self, form: Archive | Directory, sentence: str) -> None:
        if not sentence.isprintable():
            self._violation(f"the refusal of {form.name} could change a terminal")
        if bool(sentence) != (form.refused is not None) or (form.refused or "") not in sentence:
            self._violation(f"{form.name}: import said {sentence!r}, not {form.refused!r}")
        staging = self._place / "store" / "staging"
        if staging.exists() and os.listdir(staging):
            self._violation(f"{form.name}: import left {os.listdir(staging)} behind")

    def _import_stack(self, form: Stack) -> bool:
        """Make the layers; import the top one as a directory, with any result, and make an image of all."""
        trees = []
        for number, build in enumerate(form.layers):
            tree = self._place / f"layer{number}"
            tree.mkdir()
            build(tree)
            trees.append(os.fsencode(tree))
        if form.hashed:
            self._do("import", actions.import_, self._store, trees[0], "copy")
        return bool(self._do("import", actions.place, self._store, trees, "image", form.hashed))

    def _spec(self) -> MountSpec:
        return MountSpec(
            point=os.fsencode(self._point),
            log=os.fsencode(self._place / "log"),
            options=b"engine=" + self._trial.engine.encode(),
            store=self._store,
            image="image",
            workspace="w",
            mutant=self._trial.mutant,
        )

    def _walk(self, action: str, act: Callable[..., actions.Seen], *more: object) -> None:
        seen = self._do(action, act, os.fsencode(self._point), self._trial.canary.secret, *more)
        if seen is None:
            return
        reaches = isinstance(self._form, Stack) and self._form.reaches
        for wrong in seen.wrong:
            if not (reaches and "outside" in wrong):
                self._violation(f"{action}: {wrong}")

    def _commit(self) -> None:
        point, hashed = os.fsencode(self._point), not isinstance(self._form, Stack) or self._form.hashed
        refusal = self._do("commit", actions.commit_copy, point, os.fsencode(self._place / "copy"))
        if refusal is not None and bool(refusal) != (isinstance(self._form, Stack) and self._form.thin):
            self._violation(f"commit: it said {refusal!r}")
        if self._trial.full and hashed:
            self._do("commit", actions.commit_live, point, "live")
        self._end()
        if not self._do("commit", actions.commit_workspace, self._store, "w", "committed", hashed) or not hashed:
            return
        self._do("commit", actions.export, self._store, "committed", os.fsencode(self._place / "exported"))
        for problem in self._do("commit", actions.verify, self._store) or ():
            self._violation(f"commit: {problem}")

    def _end(self) -> None:
        """Unmount; the daemon must be alive, within its memory, and have logged no defect."""
        assert self._pid is not None
        peak = actions.peak_of(self._pid)
        self._note("stack", 0.0, peak)
        syscalls.umount(os.fsencode(self._point))
        code = processes.reap(self._pid)
        self._pid = None
        if code:
            self._violation(f"the daemon ended with {code}")

    # --- around ---------------------------------------------------------------------------------------------

    def _do(self, action: str, act: Callable[..., T], *args: Any) -> T | None:
        """Run one action, and check what it took and touched; return None if it failed."""
        before, used = self._trial.canary.picture(), self._used()
        try:
            done = self._trial.fork_server.run(
                act, *args, limit=_HANG * self._hostile.seconds, mutant=self._trial.mutant
            )
        except (HungError, DiedError, UserError, OSError) as error:
            self._violation(f"{action}: {act.__name__}: {error!r}")
            return None
        finally:
            if self._trial.canary.picture() != before:
                self._violation(f"{action}: the tree outside is not what it was")
            self._check_daemon(action)
        self._note(action, done.seconds + self._used() - used, done.peak)
        return done.value

    def _used(self) -> float:
        """Return the seconds of CPU time that the daemon has used."""
        return 0.0 if self._pid is None else actions.time_of(self._pid)

    def _note(self, action: str, seconds: float, memory: int) -> None:
        key = self._hostile.number, action
        known = self._trial.taken.get(key, Taken(0.0, 0))
        self._trial.taken[key] = Taken(max(known.seconds, seconds), max(known.memory, memory))
        if memory > MEMORY:
            self._violation(f"{action}: {memory >> 20} MiB")
        if seconds > self._hostile.seconds:
            self._violation(f"{action}: {seconds:.1f} s")

    def _check_daemon(self, action: str) -> None:
        if self._pid is None:
            return
        if processes.ends(self._pid, limit=0):
            self._violation(f"{action}: the daemon has ended")
            return
        log = (self._place / "log").read_text(errors="replace")
        if any(word in log for word in _COMPLAINTS):
            self._violation(f"{action}: the daemon's log says {log[:2000]}")
            (self._place / "log").write_text("")

    def _violation(self, sentence: str) -> None:
        self._trial.violations.append(f"{self._hostile.number} ({self._hostile.what}): {sentence}")

    def clear(self) -> None:
        """Remove what is left of the form; shutil cannot remove deep trees."""
        with suppress(OSError):
            syscalls.umount(os.fsencode(self._point), _DETACH)
        if self._pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            processes.reap(self._pid)
        subprocess.run(["rm", "-rf", "--one-file-system", self._place], check=True)
