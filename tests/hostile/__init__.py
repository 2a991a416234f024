"""Hostile layers, archives and users."""
