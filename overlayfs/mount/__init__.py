"""The life of a mount: start, serve, control, end. Importing the package imports neither trio nor pyfuse3."""
