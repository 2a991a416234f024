"""The engine on libfuse, through pyfuse3: `engine` mounts and serves, `handlers` answer the requests.

Absolute imports keep this package and the pyfuse3 that it imports apart.
"""
