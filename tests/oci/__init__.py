"""Images in OCI's and Docker's formats, tested with podman, buildah, skopeo and umoci."""
