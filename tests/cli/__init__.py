"""The command line as its users and the programs that call it see it."""
