"""The daemon of one mount, from opening the stack to letting it go.

This module pulls in trio and the engine, so the process that waits for the mount never loads it. The order of
the end matters: unmount first, so that nothing changes any more, then sync and unlock the upper, then remove
the record: who sees no record finds the upper free.
"""

import contextlib
import gc
import importlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from overlayfs.errors import InUseError, MountError
from overlayfs.fs.overlay import Overlay
from overlayfs.fuse.caching_policy import caching
from overlayfs.fuse.engine import Engine, MountSettings
from overlayfs.mount import flush, mounts, preflight, runtime_state
from overlayfs.mount import log as logs
from overlayfs.mount.flush import prepare_flush
from overlayfs.mount.fusermount import detach
from overlayfs.mount.mounts import KernelMount, mounted_on
from overlayfs.mount.options import ImageMount, MountOptions
from overlayfs.mount.runtime_state import Record, Written

if TYPE_CHECKING:
    from overlayfs.mount.server import ControlServer

log = logging.getLogger(__name__)

SYNC_LIMIT = 5.0  # seconds for writing dirty pages out at SIGTERM; the rest of its ten goes to the requests
BUSY_LIMIT = 1.0  # seconds that a mount in use lives on after it was detached at SIGTERM
YOUNG = 20_000  # new objects between two looks for garbage: nodes are many, live long, and are no garbage
ENDING = (signal.SIGTERM, signal.SIGINT)
_OLDEST = (5, 4)  # Linux with FUSE 7.31

Tell = Callable[[tuple[str, ...]], None]


def run(options: MountOptions, mountpoint: bytes, tell: Tell) -> None:
    """Mount and serve until the end of the mount; `tell` gets the notices when the mount answers.

    MountError if it never did, or if the connection broke while serving; it is unmounted in both cases.
    """
    _prepare_process(options)
    with contextlib.ExitStack() as stack:
        stack.callback(runtime_state.remove, os.getpid())
        if options.image_mount is not None:
            stack.enter_context(_held(options.image_mount))
        overlay = _open(options)
        stack.callback(_close, overlay)
        overlay.notices.extend(_withheld(options, overlay))
        written = preflight.written_directories(options.stack)  # before the mount covers any of it
        engine = build_engine(options, overlay)
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until the loop can turn them into an unmount
        engine.attach(mountpoint, _settings(options, overlay))
        stack.callback(_clear_remains, mountpoint)
        stack.callback(engine.detach)
        os.chdir("/")
        _serve(_Life(options, mountpoint, engine, tell, written))


def build_engine(options: MountOptions, overlay: Overlay) -> Engine:
    """Return the engine that the options ask for; `auto` is the kernel engine wherever the kernel is new enough."""
    policy = caching(options.timeout, options.writeback)
    if options.engine == "pyfuse3" or (options.engine == "auto" and _kernel_version() < _OLDEST):
        try:
            from overlayfs.fuse.pyfuse3.engine import Pyfuse3Engine
        except ModuleNotFoundError as error:
            raise MountError(f"the engine pyfuse3 needs {error.name}: pip install 'overlayfs[pyfuse3]'") from None
        return Pyfuse3Engine(overlay, policy)
    from overlayfs.fuse.kernel.engine import KernelEngine
    from overlayfs.fuse.kernel.passthrough import Io
    from overlayfs.mount.fusermount import attach

    # A commit of a mounted image holds exactly what was written before it: nothing may be written past us.
    io = Io.CACHED if options.io == "auto" and options.image_mount is not None else Io(options.io)
    return KernelEngine(overlay, policy, attach, io, options.spin)


def _kernel_version() -> tuple[int, ...]:
    """Return the version of the running kernel, two numbers."""
    major, minor, *_ = os.uname().release.split(".")
    return int(major), int("".join(filter(str.isdigit, minor)))


def _held(used: ImageMount) -> contextlib.AbstractContextManager[None]:
    from overlayfs.mount import (  # a mount of plain directories does without the store
        image_mount,
    )

    return image_mount.hold_image(used)


def _prepare_process(options: MountOptions) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.umask(0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    foreground = options.foreground or options.debug
    logs.set_up(foreground, options.debug, _log_file())


def _log_file() -> Path | None:
    """Return where the log goes on a system without syslog; nowhere, if others can write there."""
    try:
        return runtime_state.make_run_directory() / "log"
    except OSError:
        return None


def _open(options: MountOptions) -> Overlay:
    try:
        return Overlay(options.stack)
    except InUseError as error:
        raise mounts.name_holder(error) from None


def _close(overlay: Overlay) -> None:
    try:
        overlay.sync()
    except OSError as error:
        log.error("what was written last may not be on the disk: %s", error)
    finally:
        overlay.close()


def _clear_remains(mountpoint: bytes) -> None:
    """Take away our mount if it is still there after the end, dead: somebody cut its connection through fusectl."""
    if preflight.is_dead(mountpoint):
        detach(mountpoint, lazy=True)
        raise MountError(f"the mount at {os.fsdecode(mountpoint)} was cut off from the kernel")


def _withheld(options: MountOptions, overlay: Overlay) -> list[str]:
    """Return a sentence for each right that was asked for and that not every layer gives (CVE-2016-1576)."""
    facts = (
        (options.suid and not overlay.allows_suid, "a layer lies on a nosuid mount: set-id programs gain no rights"),
        (options.dev and not overlay.allows_devices, "a layer lies on a nodev mount: devices do not open"),
    )
    return [text for withheld, text in facts if withheld]


def _settings(options: MountOptions, overlay: Overlay) -> MountSettings:
    return MountSettings(
        source=options.source,
        allow_other=options.allow_other or (os.geteuid() == 0 and not options.allow_root),
        allow_root=options.allow_root,
        suid=options.suid and overlay.allows_suid,
        dev=options.dev and overlay.allows_devices,
        exec=options.exec,
        read_only=options.read_only or overlay.read_only,
        atime=options.atime,
        diratime=options.diratime,
        sync=options.sync,
        dirsync=options.dirsync,
        context=options.context,
        acl=options.xattrs and not options.stack.noacl,
        xattrs=options.xattrs,
    )


def _lodging_words(options: MountOptions) -> dict[str, str]:
    """Return what the record says of a mount of an image."""
    used = options.image_mount
    if used is None:
        return {}
    return {"image": used.image, "workspace": used.workspace, "store": os.fsdecode(used.store)}


def _serve(life: "_Life") -> None:
    try:
        trio.run(life.live)
    except BaseExceptionGroup as group:
        error = _first(group)
        if isinstance(error, MountError):
            raise error from None
        if isinstance(error, ConnectionAbortedError):
            return  # somebody has cut us off; what is left of the mount is cleared away next
        log.critical("the connection to the kernel broke", exc_info=group)
        raise MountError(f"the mount at {life.shown} ended by an error: {error}") from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class _Life:
    """What runs on the loop: the engine, the control socket, the signals."""

    def __init__(
        self, options: MountOptions, mountpoint: bytes, engine: Engine, tell: Tell, written: tuple[Written, ...]
    ) -> None:
        self.shown = os.fsdecode(mountpoint)
        self._options = options
        self._mountpoint = mountpoint
        self._engine = engine
        self._tell = tell
        self._handshake = trio.Event()
        self._kernel: KernelMount | None = mounted_on(mountpoint)
        self._written = written

    async def live(self) -> None:
        """Serve until the mount is gone."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._obey_signals)
            nursery.start_soon(self._begin, nursery)
            await self._engine.serve(self._handshake.set)
            nursery.cancel_scope.cancel()

    async def _begin(self, nursery: trio.Nursery) -> None:
        """Say that the mount is ready, once it has answered a request as any client sends it."""
        await self._handshake.wait()
        await self._engine.threads.run(flush.run_unshared, lambda: os.stat(self._mountpoint))
        record = self._record()
        listening = self._publish(record)
        self._tell(record.notices)
        if listening is not None:
            await self._engine.threads.run(flush.run_unshared, self._import_control)
            nursery.start_soon(self._control_server(record).serve, listening)
        gc.freeze()  # what lives now lives as long as the daemon; a last look at it would cost more than it frees
        gc.set_threshold(YOUNG)
        gc.enable()

    def _publish(self, record: Record) -> socket.socket | None:
        """Write the record and listen for clients; a mount without them works, it only answers no commands."""
        try:
            runtime_state.write(record)
            return runtime_state.listen(record.pid)
        except OSError as error:
            log.warning("no control socket: %s", error)
            return None

    def _import_control(self) -> None:
        """Import what serves commands: after the mount is ready, since it takes long, and not on the loop.

        The mount may cover the files of the modules, which makes reading them requests to this daemon.
        """
        importlib.import_module("overlayfs.mount.server")
        if self._options.image_mount is not None:
            importlib.import_module("overlayfs.mount.live_commit")

    def _control_server(self, record: Record) -> "ControlServer":
        from overlayfs.mount.server import ControlServer

        commits = None
        if self._options.image_mount is not None:
            from overlayfs.mount.live_commit import LiveCommits

            commits = LiveCommits(self._engine, self._options.image_mount)
        return ControlServer(self._engine, self._mountpoint, self._options, record, commits)

    def _record(self) -> Record:
        stack = self._options.stack
        return Record(
            pid=os.getpid(),
            started=runtime_state.start_time(os.getpid()) or 0,
            mountpoint=self.shown,
            device=self._kernel.device.decode() if self._kernel else "",
            source=os.fsdecode(self._options.source),
            lower=tuple(map(os.fsdecode, stack.lower)),
            upper=None if stack.upper is None else os.fsdecode(stack.upper),
            work=None if stack.work is None else os.fsdecode(stack.work),
            engine=self._engine.name,
            notices=tuple(self._engine.overlay.notices),
            written=self._written,
            **_lodging_words(self._options),
        )

    async def _obey_signals(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(*ENDING, signal.SIGUSR1) as received:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            task_status.started()
            async with trio.open_nursery() as nursery:
                ending = 0
                async for number in received:
                    if number == signal.SIGUSR1:
                        self._log_counters()
                    elif ending:
                        self._engine.stop()
                    else:
                        ending = number
                        nursery.start_soon(self._end)

    def _log_counters(self) -> None:
        counted = sorted(self._engine.counters.items())
        log.info("requests of %s: %s", self.shown, " ".join(f"{kind}={count}" for kind, count in counted) or "none")

    async def _end(self) -> None:
        """Unmount: dirty pages first, while they are still served; who uses the mount does not keep it for long.

        Serving ends by itself, and this task with it, as soon as the kernel has let the mount go.
        """
        if self._is_ours():
            with trio.move_on_after(SYNC_LIMIT):
                write_out = prepare_flush(self._engine, self._mountpoint)
                await trio.to_thread.run_sync(self._detach_synced, write_out, abandon_on_cancel=True)
        await trio.sleep(BUSY_LIMIT)
        self._engine.stop()

    def _is_ours(self) -> bool:
        """Return whether our mount is still uppermost on its mount point."""
        now = mounted_on(self._mountpoint)
        return now is not None and self._kernel is not None and now.device == self._kernel.device

    def _detach_synced(self, write_out: Callable[[], None]) -> None:
        try:
            write_out()
            flush.run_unshared(lambda: detach(self._mountpoint, lazy=True))
        except (OSError, MountError) as error:
            log.warning("the mount at %s ends with an error: %s", self.shown, error)
