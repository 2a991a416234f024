"""Converting between an image's documents and its record in the store, and choosing one image of several."""

from collections.abc import Iterable, Mapping, Sequence

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.oci import image_spec, platforms
from overlayfs.oci.image_spec import Descriptor, HistoryEntry, ImageConfig, Index, Platform, RootFs
from overlayfs.oci.layer_entries import has_opaque_root
from overlayfs.store.layers import Layer
from overlayfs.store.records import History, ImageRecord, now

_ATTESTATION = "vnd.docker.reference.type"


# --- choosing ------------------------------------------------------------------------------------------------


def choose(descriptors: Iterable[Descriptor], wanted: Platform | None, what: str) -> Descriptor:
    """Return the one of several descriptors whose image is for a platform; `wanted` defaults to the host's.

    If no platform is wanted and there is a single image, that one is returned, whatever its platform. Raises
    `UserError`, with the list of platforms, when none fits; `what` names the image in the message.
    """
    images = tuple(each for each in descriptors if _is_image(each))
    if not images:
        raise UserError(f"{what} contains no image")
    if wanted is None and len(images) == 1:
        return images[0]
    return platforms.choose(Index(2, images), wanted or platforms.host(), what)


def _is_image(descriptor: Descriptor) -> bool:
    """Return whether a descriptor may be that of an image, not of an attestation (BuildKit) or an artifact."""
    platform = descriptor.platform
    if platform is not None and platform.os == platform.architecture == "unknown":
        return False
    known = descriptor.media_type in (*image_spec.MANIFESTS, *image_spec.INDEXES)
    return known and not descriptor.artifact_type and _ATTESTATION not in (descriptor.annotations or {})


def require_platform(config: ImageConfig, wanted: Platform | None, what: str) -> None:
    """Raise `UserError` if a platform is wanted and the image's configuration is for another one."""
    if wanted is not None and config.architecture and not platforms.matches(wanted, config.platform):
        raise UserError(f"{what} is for {config.platform}, not for {wanted}")


# --- records -------------------------------------------------------------------------------------------------


def parse_config(data: bytes, what: str) -> ImageConfig:
    """Decode the configuration of an image. Raises `DocumentError`; `what` names it in the message."""
    return image_spec.decode(data, ImageConfig, what)


def image_record(
    name: str, config: ImageConfig, layers: Sequence[Layer], annotations: Mapping[str, str] | None = None
) -> ImageRecord:
    """Return the record of an image from its configuration and its layers, the LOWEST first.

    A layer whose root is opaque hides all layers below it. A mount ignores that mark, so those layers are left out of
    the stack, and the history marks their entries as empty.
    """
    first = _lowest_visible(layers)
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


def _lowest_visible(layers: Sequence[Layer]) -> int:
    return max((position for position, layer in enumerate(layers) if _is_root_opaque(layer)), default=0)


def _is_root_opaque(layer: Layer) -> bool:
    root = layer.tree_fd()
    try:
        return has_opaque_root(root)
    finally:
        sysio.close(root)


def _without_layers(history: Iterable[HistoryEntry], count: int) -> tuple[History, ...]:
    """Return the history with the entries of the first `count` layers marked as empty."""
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

    A history whose number of layers differs from that of the image is left out, because other programs refuse it.
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
