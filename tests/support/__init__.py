"""Shared by all suites: drivers, layer builders, tree dumps, users, disks, and the check for leftovers."""
