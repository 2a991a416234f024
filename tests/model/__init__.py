"""Random operations against a model of dicts."""
