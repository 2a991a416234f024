"""The life of real mounts."""
