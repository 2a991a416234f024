"""Comparing with other union file systems: how they are mounted, and what copy-up costs; also for scripts/bench."""
