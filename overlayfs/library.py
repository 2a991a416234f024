"""The store with everything that can be done to it: what Python programs use, and the command line with them.

    from overlayfs import Store

    with Store(b"/var/lib/overlayfs") as store:
        for image in store.images():
            print(image.name, image.layers)

Each method loads what it needs when it is called.
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
    from overlayfs.store.layers import Layer
    from overlayfs.store.records import ImageRecord
    from overlayfs.store.repair import Told
    from overlayfs.store.scan import Progress
    from overlayfs.store.verify import Checked


class Store(LayerStore):
    """A store; `LayerStore` says what opening it means and what else it can do."""

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

    def commit_workspace(
        self, name: str, *, image: str | None = None, message: str = "", author: str = "", allow_empty: bool = False,
        progress: "Progress | None" = None,
    ) -> "Layer":  # fmt: skip
        """Make the upper of an unmounted workspace a layer on top of its stack, by one rename, and hash it.

        `image` is put for the longer stack. `progress` is told entries and bytes of the hashing. UserError while the
        workspace is mounted, and when nothing was changed unless `allow_empty`.
        """
        from overlayfs.store import commit

        wish = commit.CommitRequest(image=image, message=message, author=author, allow_empty=allow_empty)
        return commit.hash_layer(self, commit.commit_workspace(self, name, wish), progress)

    def commit_upper(
        self, config: "StackConfig", *, image: str, message: str = "", author: str = "", allow_empty: bool = False,
        progress: "Progress | None" = None,
    ) -> "Layer":  # fmt: skip
        """Make a layer of a copy of an upper that is not mounted, and an image with it on top of the layers below.

        `config` names the upper, its work directory, and as layers trees of layers of this store.
        """
        from overlayfs.store import commit

        below = [self.layer_of_tree(path) for path in config.lower]
        wish = commit.CommitRequest(image=image, message=message, author=author, allow_empty=allow_empty)
        return commit.commit_upper(self, config, below, wish, progress)

    def squash(
        self,
        name: str,
        target: str,
        last: int | None = None,
        *,
        message: str = "",
        author: str = "",
        progress: "Progress | None" = None,
        hashed: "Progress | None" = None,
    ) -> "ImageRecord":
        """Call the image `name`, with its `last` topmost layers (None: all) made one, `target`, and return that.

        `progress` is told entries and bytes while the layer is written, `hashed` while it is read again. UserError:
        nothing is left behind.
        """
        from overlayfs.store import squash

        return squash.squash_image(
            self, name, target, last, message=message, author=author, progress=progress, hashed=hashed
        )

    def verify(
        self, given: str | None = None, *, threads: int | None = None, progress: "Progress | None" = None
    ) -> "Checked":
        """Read an image, a workspace's layers or a layer, None for the whole store, and say what is not as recorded.

        `progress` is told entries and bytes. Problems are part of the result; UserError for what is not there at all.
        """
        from overlayfs.store import verify

        return verify.verify(self.directory, self._named(given), threads, progress)

    def recorded_size(self, given: str | None = None) -> int:
        """Return how many bytes `verify` will read at most."""
        from overlayfs.store import verify

        return verify.recorded_size(self.directory, self._named(given))

    def repair(
        self,
        given: str | None = None,
        *,
        source: str,
        threads: int | None = None,
        progress: "Progress | None" = None,
        told: "Told | None" = None,
        plain_http: bool = False,
        ca: str | None = None,
    ) -> "tuple[Checked, Checked]":
        """Verify, put right what can be, and verify that again; return what was found before and what is wrong still.

        Content is taken from `source` and from all other layers of this store: an image of it, the directory of
        another store, or an image of a registry (`plain_http` and `ca` as in `pull`). `told` is told in a few words
        what is being done. UserError when a damaged layer is in use.
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
        tell = told or (lambda words: None)
        with ExitStack() as held:
            repair.repair(self, before.problems, repair.source_stores(self, source, load, tell, held), tell)
        return before, self.verify(given, threads=threads, progress=progress)

    def _named(self, given: str | None) -> tuple[str, ...] | None:
        return None if given is None else self._ids_of(given)

    def diff(self, before: str | None, after: str) -> "Iterator[Change]":
        """Yield what leads from one image, workspace or layer to another; None is what `after` has below its top.

        Changes of a workspace count as they are on the disk. UserError for what is not there or cannot be read.
        """
        from overlayfs.store import compare, diff_operands

        names = [after] if before is None else [before, after]
        with diff_operands.hold(self, *names):
            yield from compare.compare(*diff_operands.pair(self, before, after))
