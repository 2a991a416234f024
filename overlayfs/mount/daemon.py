"""The daemon of one mount: opens the stack, mounts, serves, and cleans up.

The clean-up has an order: unmount, so that nothing changes any more; sync and unlock the upper; release the locks of
an image; remove the record. Therefore, if no record exists, the upper is unlocked.

This module imports trio and the engine, which takes long. The process that the user waits for never imports it.
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
from overlayfs.mount.fusermount import detach
from overlayfs.mount.mounts import KernelMount, mounted_on
from overlayfs.mount.options import ImageMount, MountOptions
from overlayfs.mount.runtime_state import Record, WrittenDirectory

if TYPE_CHECKING:
    from overlayfs.mount.control_server import ControlServer

log = logging.getLogger(__name__)

FLUSH_LIMIT = 5.0  # seconds for dirty pages at SIGTERM; service managers grant ten in all, the requests get the rest
BUSY_LIMIT = 1.0  # seconds that a mount in use is still served after it was detached at SIGTERM
GC_THRESHOLD = 20_000  # new objects between two collections: nodes are many, live long, and are not garbage
TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_OLDEST_KERNEL = (5, 4)  # Linux with FUSE 7.31

OnReady = Callable[[tuple[str, ...]], None]


def run(options: MountOptions, mountpoint: bytes, on_ready: OnReady) -> None:
    """Mount, and serve until the mount is gone. `on_ready(notices)` is called when the mount answers.

    MountError if it never answers or if the connection to the kernel breaks; it is unmounted in both cases.
    """
    _prepare_process(options)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(runtime_state.remove, os.getpid())
        if options.image_mount is not None:
            cleanup.enter_context(_hold_image(options.image_mount))
        overlay = _open_overlay(options)
        cleanup.callback(_close_overlay, overlay)
        overlay.notices.extend(_withheld(options, overlay))
        written = preflight.written_directories(options.stack)  # before the mount covers any of it
        engine = build_engine(options, overlay)
        signal.pthread_sigmask(signal.SIG_BLOCK, TERMINATION_SIGNALS)  # until the loop turns them into an unmount
        engine.attach(mountpoint, _settings(options, overlay))
        cleanup.callback(_detach_dead, mountpoint)
        cleanup.callback(engine.detach)
        os.chdir("/")
        _serve(_Service(options, mountpoint, engine, on_ready, written))


def build_engine(options: MountOptions, overlay: Overlay) -> Engine:
    """Return the engine that the options ask for; `auto` is the kernel engine wherever the kernel is new enough."""
    policy = caching(options.timeout, options.writeback)
    if options.engine == "pyfuse3" or (options.engine == "auto" and _kernel_version() < _OLDEST_KERNEL):
        try:
            from overlayfs.fuse.pyfuse3.engine import Pyfuse3Engine
        except ModuleNotFoundError as error:
            raise MountError(f"the engine pyfuse3 needs {error.name}: pip install 'overlayfs[pyfuse3]'") from None
        return Pyfuse3Engine(overlay, policy)
    from overlayfs.fuse.kernel.engine import KernelEngine
    from overlayfs.fuse.kernel.passthrough import Io
    from overlayfs.mount.fusermount import attach

    # A live commit holds exactly what was written before it, so no write may bypass the daemon.
    io = Io.CACHED if options.io == "auto" and options.image_mount is not None else Io(options.io)
    return KernelEngine(overlay, policy, attach, io, options.busy_poll)


def _kernel_version() -> tuple[int, ...]:
    """Return the version of the running kernel, two numbers."""
    major, minor, *_ = os.uname().release.split(".")
    return int(major), int("".join(filter(str.isdigit, minor)))


def _hold_image(used: ImageMount) -> contextlib.AbstractContextManager[None]:
    from overlayfs.mount import image_mount  # imports the store, which a mount of plain directories does not need

    return image_mount.hold_image(used)


def _prepare_process(options: MountOptions) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.umask(0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    foreground = options.foreground or options.debug
    logs.set_up(foreground, options.debug, _log_file())


def _log_file() -> Path | None:
    """Return the log file for a system without syslog; None if other users could write to it."""
    try:
        return runtime_state.make_run_directory() / "log"
    except OSError:
        return None


def _open_overlay(options: MountOptions) -> Overlay:
    try:
        return Overlay(options.stack)
    except InUseError as error:
        raise mounts.name_holder(error) from None


def _close_overlay(overlay: Overlay) -> None:
    try:
        overlay.sync()
    except OSError as error:
        log.error("the latest writes may not be durable: %s", error)
    finally:
        overlay.close()


def _detach_dead(mountpoint: bytes) -> None:
    """Unmount what is left of a mount whose connection was aborted through fusectl. MountError if there is anything."""
    if preflight.is_dead(mountpoint):
        detach(mountpoint, lazy=True)
        raise MountError(f"the mount at {os.fsdecode(mountpoint)} was cut off from the kernel")


def _withheld(options: MountOptions, overlay: Overlay) -> list[str]:
    """Return a notice for each right that was asked for and that not every layer grants (CVE-2016-1576)."""
    facts = (
        (options.suid and not overlay.allows_suid, "a layer is on a nosuid mount: set-id programs gain no rights"),
        (options.dev and not overlay.allows_devices, "a layer is on a nodev mount: devices do not open"),
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


def _image_fields(options: MountOptions) -> dict[str, str]:
    """Return the fields of the record that only a mount of an image has."""
    used = options.image_mount
    if used is None:
        return {}
    return {"image": used.image, "workspace": used.workspace, "store": os.fsdecode(used.store)}


def _serve(service: "_Service") -> None:
    try:
        trio.run(service.run)
    except BaseExceptionGroup as group:
        error = _first(group)
        if isinstance(error, MountError):
            raise error from None
        if isinstance(error, ConnectionAbortedError):
            return  # aborted through fusectl; `_detach_dead` reports it
        log.critical("the connection to the kernel broke", exc_info=group)
        raise MountError(f"the mount at {service.shown} ended by an error: {error}") from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class _Service:
    """What runs on the loop of a mounted daemon: the engine, the control server and the signals.

    1. The engine answers INIT, the first request of the kernel.
    2. A stat of the mount point shows that requests are answered. The record is written, the control socket listens,
       and the mount is announced (`on_ready`).
    3. The engine and the control server serve.
    4. The mount is gone: it was unmounted, by a command or by `_shut_down` at a signal. The engine returns, which
       cancels the rest.
    """

    def __init__(
        self,
        options: MountOptions,
        mountpoint: bytes,
        engine: Engine,
        on_ready: OnReady,
        written: tuple[WrittenDirectory, ...],
    ) -> None:
        self.shown = os.fsdecode(mountpoint)
        self._options = options
        self._mountpoint = mountpoint
        self._engine = engine
        self._on_ready = on_ready
        self._handshake = trio.Event()
        self._kernel_mount: KernelMount | None = mounted_on(mountpoint)
        self._written = written

    async def run(self) -> None:
        """Serve until the mount is gone."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._handle_signals)
            nursery.start_soon(self._announce, nursery)
            await self._engine.serve(self._handshake.set)
            nursery.cancel_scope.cancel()

    async def _announce(self, nursery: trio.Nursery) -> None:
        """Announce the mount when it has answered a request such as any program sends; then serve commands."""
        await self._handshake.wait()
        await self._engine.threads.run(flush.run_unshared, lambda: os.stat(self._mountpoint))
        record = self._record()
        listening = self._publish(record)
        self._on_ready(record.notices)
        if listening is not None:
            nursery.start_soon(self._serve_commands, record, listening)
        gc.freeze()  # what exists now is needed until the end; examining it costs more than it could free
        gc.set_threshold(GC_THRESHOLD)
        gc.enable()

    def _publish(self, record: Record) -> socket.socket | None:
        """Write the record and listen on the control socket. A mount works without them, but takes no commands."""
        try:
            runtime_state.write(record)
            return runtime_state.listen(record.pid)
        except OSError as error:
            log.warning("no control socket: %s", error)
            return None

    async def _serve_commands(self, record: Record, listening: socket.socket) -> None:
        try:
            await self._engine.threads.run(flush.run_unshared, self._import_control)
            server = self._control_server(record)
        except Exception:
            log.exception("no commands are served")
            listening.close()
            return
        await server.serve(listening)

    def _import_control(self) -> None:
        """Import the modules of the control server: not before the mount is ready, since it takes long.

        Not on the loop: where the mount covers the files of these modules, to read them is a request to this daemon.
        """
        importlib.import_module("overlayfs.mount.control_server")
        if self._options.image_mount is not None:
            importlib.import_module("overlayfs.mount.live_commit")

    def _control_server(self, record: Record) -> "ControlServer":
        from overlayfs.mount.control_server import ControlServer

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
            device=self._kernel_mount.device.decode() if self._kernel_mount else "",
            source=os.fsdecode(self._options.source),
            lower=tuple(map(os.fsdecode, stack.lower)),
            upper=None if stack.upper is None else os.fsdecode(stack.upper),
            work=None if stack.work is None else os.fsdecode(stack.work),
            engine=self._engine.name,
            notices=tuple(self._engine.overlay.notices),
            written=self._written,
            **_image_fields(self._options),
        )

    async def _handle_signals(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Shut down at the first SIGTERM or SIGINT, stop at once at the second; log the counters at SIGUSR1."""
        with trio.open_signal_receiver(*TERMINATION_SIGNALS, signal.SIGUSR1) as received:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINATION_SIGNALS)
            task_status.started()
            async with trio.open_nursery() as nursery:
                shutting_down = False
                async for number in received:
                    if number == signal.SIGUSR1:
                        self._log_counters()
                    elif shutting_down:
                        self._engine.stop()
                    else:
                        shutting_down = True
                        nursery.start_soon(self._shut_down)

    def _log_counters(self) -> None:
        counted = sorted(self._engine.counters.items())
        log.info("requests of %s: %s", self.shown, " ".join(f"{kind}={count}" for kind, count in counted) or "none")

    async def _shut_down(self) -> None:
        """Flush dirty pages while writes are still served, and detach; programs that use the mount delay it briefly.

        The engine returns as soon as the kernel has destroyed the mount, which cancels this task.
        """
        if self._is_ours():
            with trio.move_on_after(FLUSH_LIMIT):
                write_back = flush.prepare_flush(self._engine, self._mountpoint)
                await trio.to_thread.run_sync(self._flush_and_detach, write_back, abandon_on_cancel=True)
        await trio.sleep(BUSY_LIMIT)
        self._engine.stop()

    def _is_ours(self) -> bool:
        """Return whether our mount is still uppermost on its mount point."""
        now = mounted_on(self._mountpoint)
        return now is not None and self._kernel_mount is not None and now.device == self._kernel_mount.device

    def _flush_and_detach(self, write_back: Callable[[], None]) -> None:
        try:
            write_back()
            flush.run_unshared(lambda: detach(self._mountpoint, lazy=True))
        except (OSError, MountError) as error:
            log.warning("the mount at %s ends with an error: %s", self.shown, error)
