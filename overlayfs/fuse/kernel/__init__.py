"""The engine that speaks the FUSE protocol itself.

engine: the loop that receives requests and sends replies. session: what all handlers share. handlers/: one method per
kind of request. request, protocol, handshake, busy_poll: no state of the mount. connection: /dev/fuse apart from
replies. node_ids: nodes by the numbers that the kernel uses. passthrough: which open files the kernel reads and writes
by itself. standby: answers while the loop is blocked.
"""
