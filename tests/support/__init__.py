"""What the suites share: drivers, layer builders, tree dumps, users, disks, and the check for leftovers."""
