"""The checks of test_passthrough find the faults they are made for: each faulty engine fails some of them."""

import os
import subprocess

import pytest

from overlayfs.mount import mounts, unmount
from tests.mounted import passthrough_checks
from tests.mounted.conftest import Mount
from tests.mounted.passthrough_checks import AUTO, PASSTHROUGH, prepare
from tests.mounted.wrong import FAULTS
from tests.support.polling import until

pytestmark = pytest.mark.engine("kernel")

# fault -> the mount option io, and the checks that must fail
NOTICED = {
    "backing_file_is_kept_across_copy_up": (
        "auto",
        ["layers_are_never_written", "no_order_of_opens_is_an_error"],
    ),
    "joins_readers_of_layers": ("passthrough", ["layers_are_never_written"]),
    "cached_and_passthrough_at_once": ("auto", ["no_order_of_opens_is_an_error"]),
    "a_backing_file_for_each_open": ("auto", ["no_order_of_opens_is_an_error"]),
    "pages_survive_writes_in_passthrough": ("auto", ["pages_are_current_after_a_write"]),
    "set_id_bits_stay": ("cached", ["set_id_bits_are_cleared_as_on_a_local_file_system"]),
    "the_capability_is_kept": ("auto", ["set_id_bits_set_after_the_open_are_cleared"]),
    "attributes_are_cached": (
        "auto",
        ["set_id_bits_set_after_the_open_are_cleared", "sizes_and_times_are_current_at_once"],
    ),
    "stale_every_time": ("passthrough", ["stale_is_for_the_kernel_only"]),
    "entries_are_dropped_from_the_loop": ("auto", ["no_request_hangs"]),
}


def test_every_fault_is_tried() -> None:
    assert NOTICED.keys() == FAULTS.keys()


@pytest.mark.parametrize(("fault", "check"), [(fault, check) for fault, (_, each) in NOTICED.items() for check in each])
def test_a_wrong_engine_fails_the_check(mount: Mount, fault: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    io, _ = NOTICED[fault]
    monkeypatch.setattr(passthrough_checks, "LIMIT", 3.0)
    prepare(mount, check)
    process = mount.wrong(fault, f"suid,volatile,io={io}").process
    known = mounts.find(os.fsencode(mount.point))  # later the mount may hang
    try:
        with pytest.raises((AssertionError, OSError)):
            (PASSTHROUGH if io == "passthrough" else AUTO)[check](mount)
    finally:
        _end(process, known)


def _end(process: subprocess.Popen[str], known: mounts.Mount) -> None:
    """End a daemon, even one that SIGKILL does not end, and its clients; other tests may unmount fusectl meanwhile."""

    def ended() -> bool:
        unmount.abort(known)
        return process.poll() is not None

    until(ended)
