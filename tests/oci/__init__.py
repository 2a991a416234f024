"""Images as others know them, checked with the programs of others."""
