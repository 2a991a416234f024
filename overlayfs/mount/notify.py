"""Telling a service manager about the state of the daemon, as sd_notify(3) does."""

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Send a state such as READY=1 to the socket that the manager named; nothing if there is no manager."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        sender.sendall(state.encode())
