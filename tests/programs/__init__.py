"""Real programs in the mount."""
