"""From the documents of an image to its record in the store, and back; and which image of several is meant."""

from collections.abc import Iterable, Mapping, Sequence

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.oci import image_spec, platforms
from overlayfs.oci.image_spec import Descriptor, HistoryEntry, ImageConfig, Index, Platform, RootFs
from overlayfs.oci.layer_entries import has_opaque_root
from overlayfs.store.layers import Layer
from overlayfs.store.records import History, ImageRecord, now

_ATTESTATION = "vnd.docker.reference.type"


# --- which one -----------------------------------------------------------------------------------------------


def choose(descriptors: Iterable[Descriptor], wanted: Platform | None, what: str) -> Descriptor:
    """Return the one of several manifests that is for a platform, the host's unless `wanted`.

    A single one is taken as it is when nothing is wanted. UserError, with the list, when none fits.
    """
    images = tuple(each for each in descriptors if _is_image(each))
    if not images:
        raise UserError(f"{what} holds no image")
    if wanted is None and len(images) == 1:
        return images[0]
    return platforms.choose(Index(2, images), wanted or platforms.host(), what)


def _is_image(descriptor: Descriptor) -> bool:
    """Return whether a descriptor may lead to an image: no attestation, no artifact."""
    platform = descriptor.platform
    if platform is not None and platform.os == platform.architecture == "unknown":
        return False
    known = descriptor.media_type in (*image_spec.MANIFESTS, *image_spec.INDEXES)
    return known and not descriptor.artifact_type and _ATTESTATION not in (descriptor.annotations or {})


def require_platform(config: ImageConfig, wanted: Platform | None, what: str) -> None:
    """Refuse an image whose configuration is for another platform than the one that was asked for."""
    if wanted is not None and config.architecture and not platforms.matches(wanted, config.platform):
        raise UserError(f"{what} is for {config.platform}, not for {wanted}")


# --- records -------------------------------------------------------------------------------------------------


def parse_config(data: bytes, what: str) -> ImageConfig:
    """Read the configuration of an image; DocumentError for one that cannot be used."""
    return image_spec.decode(data, ImageConfig, what)


def image_record(
    name: str, config: ImageConfig, layers: Sequence[Layer], annotations: Mapping[str, str] | None = None
) -> ImageRecord:
    """Return the record of an image from its configuration and its layers, the LOWEST first.

    A layer whose root is opaque hides all below it, which no mount would do: the image begins with it, and the history
    says of the others that they hold nothing.
    """
    first = _first_that_counts(layers)
    return ImageRecord(
        name=name,
        layers=tuple(layer.id for layer in reversed(layers[first:])),
        created=config.created or now(),
        author=config.author,
        architecture=config.architecture,
        os=config.os or "linux",
        variant=config.variant,
        config=config.config or {},
        history=_without_layers(config.history or (), first),
        annotations=dict(annotations or {}),
    )


def _first_that_counts(layers: Sequence[Layer]) -> int:
    return max((position for position, layer in enumerate(layers) if _cuts_off(layer)), default=0)


def _cuts_off(layer: Layer) -> bool:
    root = layer.tree_fd()
    try:
        return has_opaque_root(root)
    finally:
        sysio.close(root)


def _without_layers(history: Iterable[HistoryEntry], count: int) -> tuple[History, ...]:
    """Return the history with its first `count` layers said to be empty."""
    found = []
    for each in history:
        empty = each.empty_layer or count > 0
        count -= not each.empty_layer
        found.append(
            History(
                created=each.created,
                author=each.author,
                created_by=each.created_by,
                comment=each.comment,
                empty_layer=empty,
            )
        )
    return tuple(found)


def config_of(record: ImageRecord, diff_ids: Sequence[str]) -> ImageConfig:
    """Return the configuration of a stored image; `diff_ids` of its layers, the LOWEST first.

    A history that does not count as many layers as there are is left out: readers refuse one.
    """
    steps = tuple(
        HistoryEntry(each.created, each.author, each.created_by, each.comment, each.empty_layer)
        for each in record.history
    )
    complete = sum(not each.empty_layer for each in steps) == len(diff_ids)
    return ImageConfig(
        architecture=record.architecture or platforms.host().architecture,
        os=record.os,
        variant=record.variant,
        created=record.created,
        author=record.author,
        config=record.config or None,
        rootfs=RootFs(tuple(diff_ids)),
        history=steps if steps and complete else None,
    )
