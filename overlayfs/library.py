"""The public store: `LayerStore` with import, export, pull, push, commit, squash, verify, repair and diff.

    from overlayfs import Store

    with Store(b"/var/lib/overlayfs") as store:
        for image in store.images():
            print(image.name, image.layers)

Modules are imported by the methods that need them, so that `overlayfs images` does not load a registry client.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from overlayfs.store.store import LayerStore

if TYPE_CHECKING:
    from overlayfs.fs.config import StackConfig
    from overlayfs.oci.blobs import ImageProgress, Notice
    from overlayfs.oci.pull import Pulled
    from overlayfs.oci.push import Pushed
    from overlayfs.oci.transfer import ProgressCallback
    from overlayfs.store.compare import Change
    from overlayfs.store.layers import Layer, StagedLayer
    from overlayfs.store.records import ImageRecord
    from overlayfs.store.repair import Report
    from overlayfs.store.scan import Progress
    from overlayfs.store.verify import Checked
    from overlayfs.store.workspaces import Claim, Workspace


class Store(LayerStore):
    """A store; docs/python-api.md shows its use. `LayerStore` has the parts `layers`, `images` and `workspaces`."""

    # --- layers, images, workspaces: the names of docs/python-api.md for what the parts do -------------

    def new_layer(self) -> "StagedLayer":
        """Begin a layer: fill its tree, then publish it."""
        return self.layers.stage()

    def layer(self, given: str) -> "Layer":
        """Return the layer whose id or digest begins with `given`; raises UserError if there is not exactly one."""
        return self.layers.find(given)

    def by_digest(self, digest: str) -> "Layer | None":
        """Return a layer whose manifest has this digest (``sha256:HEX``), protected from gc, or None."""
        return self.layers.by_digest(digest)

    def by_diff_id(self, diff_id: str) -> "Layer | None":
        """Return a layer whose canonical tar has this digest (``sha256:HEX``), protected from gc, or None."""
        return self.layers.by_diff_id(diff_id)

    def unfinished(self) -> "Iterator[Layer]":
        """Yield the layers that have no manifest yet."""
        return self.layers.unfinished()

    def image(self, name: str) -> "ImageRecord":
        """Return the image NAME[:TAG]; raises UserError if there is none."""
        return self.images.find(name)

    def put_image(self, record: "ImageRecord") -> "ImageRecord":
        """Make a name stand for a stack, atomically; raises UserError if a layer is not in the store."""
        return self.images.put(record)

    def tag(self, old: str, new: str) -> "ImageRecord":
        """Give the image `old` the second name `new`, which stops naming what it named before."""
        return self.images.tag(old, new)

    def remove_image(self, name: str) -> None:
        """Remove a name; its layers stay until gc. Raises UserError if there is none."""
        self.images.remove(name)

    def workspace(self, name: str) -> "Workspace":
        """Return the workspace `name`; raises UserError if there is none."""
        return self.workspaces.find(name)

    def new_workspace(self, image: str, name: str | None = None) -> "Workspace":
        """Create a workspace of an image, not locked; raises UserError if there is one of that name."""
        return self.workspaces.create(image, name)

    def claim_workspace(self, image: str, name: str | None = None, ephemeral: bool = False) -> "Claim":
        """Return a new or an existing workspace of an image, held by the caller as a mount holds it.

        Raises UserError if it belongs to another image, WorkspaceInUseError if it is mounted.
        """
        return self.workspaces.claim(image, name, ephemeral)

    def remove_workspace(self, name: str) -> None:
        """Remove a workspace with all its changes; raises WorkspaceInUseError while it is mounted."""
        self.workspaces.remove(name)

    # --- from and to other programs --------------------------------------------------------------------

    def import_image(
        self,
        source: bytes,
        name: str,
        *,
        platform: str | None = None,
        author: str = "",
        message: str = "",
        progress: "ImageProgress | None" = None,
        notice: "Notice | None" = None,
    ) -> "ImageRecord":
        """Make `source` the image `name`: a directory, a layer tar, an OCI layout, an oci-archive or docker-archive.

        ``PATH:NAME`` is one of several images in it, ``-`` standard input. `platform`: OS/ARCHITECTURE[/VARIANT], else
        this machine's. `author` and `message` are for a layer without a history. `progress(layer, layers, bytes)`
        is called periodically, `notice(sentence)` for each kind of thing that could not be kept. UserError: nothing of
        it is in the store.
        """
        from overlayfs.oci import blobs, image_import, platforms

        wanted = None if platform is None else platforms.parse(platform)
        options = image_import.ImportOptions(wanted, author, message, progress, notice or blobs.ignore_notice)
        return image_import.import_image(self, source, name, options)

    def export_image(
        self,
        name: str,
        destination: bytes,
        *,
        form: str = "oci",
        compression: str | None = None,
        progress: "ImageProgress | None" = None,
        notice: "Notice | None" = None,
    ) -> None:
        """Write an image to a new file or directory, to a pipe, or to standard output (``-``).

        `form`: oci, oci-archive, docker-archive, tar or dir. `compression`: gzip, zstd or none. The other arguments
        are those of `import_image`. UserError: nothing is there.
        """
        from overlayfs.oci import blobs, image_export
        from overlayfs.oci.compression import Compression

        options = image_export.ExportOptions(
            image_export.Format(form),
            None if compression is None else Compression(compression),
            progress,
            notice or blobs.ignore_notice,
        )
        image_export.export_image(self, name, destination, options)

    def pull(
        self,
        reference: str,
        *,
        name: str | None = None,
        platform: str | None = None,
        plain_http: bool = False,
        ca: str | None = None,
        progress: "ProgressCallback | None" = None,
        notice: "Notice | None" = None,
    ) -> "Pulled":
        """Load the image behind REGISTRY/REPO[:TAG][@DIGEST] and call it `name`, or as it is called there.

        `platform`: OS/ARCHITECTURE[/VARIANT], else this machine's. `plain_http`: no TLS, with this machine alone.
        `ca`: a file of certificates to trust beside the system's. `progress(LayerProgress)` is called periodically
        from several threads, `notice(sentence)` for each kind of thing that could not be kept. UserError: nothing is
        named, and what was downloaded is used by the next pull.
        """
        from overlayfs.oci import blobs, http_client, platforms, pull, transfer
        from overlayfs.oci import reference as references

        found = references.parse(reference)
        wanted = None if platform is None else platforms.parse(platform)
        chosen = name or references.image_name(found)
        with http_client.HttpClient(plain_http=plain_http, ca=ca) as client:
            return pull.pull(
                self, found, name=chosen, client=client, platform=wanted,
                progress=progress or transfer.ignore_progress, notice=notice or blobs.ignore_notice,
            )  # fmt: skip

    def push(
        self,
        name: str,
        reference: str,
        *,
        plain_http: bool = False,
        ca: str | None = None,
        progress: "ProgressCallback | None" = None,
        notice: "Notice | None" = None,
    ) -> "Pushed":
        """Send the image `name` to REGISTRY/REPO[:TAG]. The other arguments are those of `pull`."""
        from overlayfs.oci import blobs, http_client, push, transfer
        from overlayfs.oci import reference as references

        found = references.parse(reference)
        with http_client.HttpClient(plain_http=plain_http, ca=ca) as client:
            return push.push(
                self,
                name,
                found,
                client=client,
                progress=progress or transfer.ignore_progress,
                notice=notice or blobs.ignore_notice,
            )

    # --- commits ---------------------------------------------------------------------------------------

    def commit_workspace(
        self, name: str, *, image: str | None = None, message: str = "", author: str = "", allow_empty: bool = False,
        progress: "Progress | None" = None,
    ) -> "Layer":  # fmt: skip
        """Make the upper of an unmounted workspace a layer on top of its stack, by one rename, and hash it.

        `image` is the name of an image to put for the longer stack. `progress(entries, bytes)` is called periodically
        while the layer is hashed. Raises WorkspaceInUseError while the workspace is mounted, NothingToCommitError if it
        has no changes, unless `allow_empty`.
        """
        from overlayfs.store import commit

        request = commit.CommitRequest(image=image, message=message, author=author, allow_empty=allow_empty)
        return commit.hash_layer(self, commit.commit_workspace(self, name, request), progress)

    def commit_upper(
        self, config: "StackConfig", *, image: str, message: str = "", author: str = "", allow_empty: bool = False,
        progress: "Progress | None" = None,
    ) -> "Layer":  # fmt: skip
        """Make a layer of a copy of an unmounted upper, and an image with it on top of the layers below.

        `config` names the upper, its work directory, and as layers trees of layers of this store. The other arguments
        and the errors are those of `commit_workspace`; raises MountError while the upper is mounted.
        """
        from overlayfs.store import commit

        below = [self.layers.of_tree(path) for path in config.lower]
        request = commit.CommitRequest(image=image, message=message, author=author, allow_empty=allow_empty)
        return commit.commit_upper(self, config, below, request, progress)

    def squash(
        self,
        name: str,
        target: str,
        last: int | None = None,
        *,
        message: str = "",
        author: str = "",
        progress: "Progress | None" = None,
        hash_progress: "Progress | None" = None,
    ) -> "ImageRecord":
        """Put an image `target`: the image `name` with its `last` topmost layers (None: all) made one. Return it.

        `progress(entries, bytes)` is called periodically while the layer is written, `hash_progress(entries, bytes)`
        while it is hashed. Raises UserError if the image has fewer layers or cannot be read; nothing is left behind.
        """
        from overlayfs.store import squash

        return squash.squash_image(
            self, name, target, last, message=message, author=author, progress=progress, hash_progress=hash_progress
        )

    # --- reading again ---------------------------------------------------------------------------------

    def verify(
        self, given: str | None = None, *, threads: int | None = None, progress: "Progress | None" = None
    ) -> "Checked":
        """Read an image, a workspace's layers or a layer, None for the whole store, and compare it with its records.

        `progress(entries, bytes)` is called periodically; `threads` None means as many as fit the machine. Problems are
        part of the result. Raises UserError if there is nothing of that name.
        """
        from overlayfs.store import verify

        return verify.verify(self.directory, self._selected(given), threads, progress)

    def recorded_size(self, given: str | None = None) -> int:
        """Return how many bytes `verify` reads at most."""
        from overlayfs.store import verify

        return verify.recorded_size(self.directory, self._selected(given))

    def _selected(self, given: str | None) -> tuple[str, ...] | None:
        return None if given is None else self.layer_ids(given)

    def repair(
        self,
        given: str | None = None,
        *,
        source: str,
        threads: int | None = None,
        progress: "Progress | None" = None,
        report: "Report | None" = None,
        plain_http: bool = False,
        ca: str | None = None,
    ) -> "tuple[Checked, Checked]":
        """Verify, repair what can be repaired, and verify the result; return both verifications.

        Content is taken from `source` and from all other layers of this store. `source` is an image of this store, the
        directory of another store, or an image of a registry (`plain_http` and `ca` as in `pull`). `report(text)` is
        called with what is being done. Raises UserError if a damaged layer is in use.
        """
        from overlayfs.store import repair

        def load(path: bytes, reference: str) -> "Store":
            loaded = Store(path)
            try:
                loaded.pull(reference, plain_http=plain_http, ca=ca)
            except BaseException:
                loaded.close()
                raise
            return loaded

        before = self.verify(given, threads=threads, progress=progress)
        if not before.problems:
            return before, before
        report = report or (lambda text: None)
        with ExitStack() as opened:
            sources = repair.source_stores(self, source, load, report, opened)
            repair.repair(self, before.problems, sources, report)
        return before, self.verify(given, threads=threads, progress=progress)

    def diff(self, before: str | None, after: str) -> "Iterator[Change]":
        """Yield the changes from one image, workspace or layer to another; None means `after` without its top layer.

        Changes of a mounted workspace count as far as they are on disk. Raises UserError if there is nothing of that
        name, or if it cannot be read.
        """
        from overlayfs.store import compare, diff_operands

        names = [after] if before is None else [before, after]
        with diff_operands.hold(self, *names):
            yield from compare.compare(*diff_operands.pair(self, before, after))
