"""Layers at rest. So far: making one from an upper."""
