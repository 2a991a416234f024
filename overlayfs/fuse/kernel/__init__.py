"""The engine that speaks the FUSE protocol itself.

protocol, handshake, spin: pure. connection: what goes over /dev/fuse besides replies. openings: how each file is open.
desk: what all handlers need; names, nodes, files, listings: the handlers. engine: the loop.
"""
