"""Tests of real mounts."""
