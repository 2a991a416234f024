"""Crashes and disk failures at every changing system call of every operation."""
