"""The command line. Installs as `overlayfs_cli`; nothing imports it but its own entry points and tests."""
