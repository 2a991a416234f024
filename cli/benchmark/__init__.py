"""Measuring beside the peers: who takes part, and what copy-up costs. For `overlayfs bench` and scripts/bench."""
