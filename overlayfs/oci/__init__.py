"""Images as others know them: layer archives, image layouts, archives of images, registries."""
