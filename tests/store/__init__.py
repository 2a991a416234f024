"""The store: layers at rest, images, workspaces, and what keeps them whole."""
