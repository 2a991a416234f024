"""Layers, archives, users and neighbours that mean harm."""
