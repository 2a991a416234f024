"""The version of the program: read by the packaging, printed by both commands."""

VERSION = "0.1.0"
