"""Images in OCI's and Docker's formats: layer tars, image layouts, archives of images, registries."""
