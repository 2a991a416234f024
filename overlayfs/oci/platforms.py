"""Platforms: parsing them, and choosing the manifest of an index that fits one.

Sources: image-spec ``image-index.md`` (`platform`); containerd ``platforms`` for the order among variants.
"""

import os
import re
from collections.abc import Sequence

from overlayfs.errors import UsageError, UserError, listed
from overlayfs.oci.image_spec import Descriptor, Index, Platform

_MACHINES = {
    "x86_64": ("amd64", ""), "aarch64": ("arm64", "v8"), "armv8l": ("arm", "v7"), "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"), "armv5tel": ("arm", "v5"), "i386": ("386", ""), "i686": ("386", ""),
    "ppc64le": ("ppc64le", ""), "s390x": ("s390x", ""), "riscv64": ("riscv64", ""), "loongarch64": ("loong64", ""),
}  # fmt: skip
_ALIASES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "armhf": "arm", "i386": "386"}
_WORD = re.compile(r"[a-z0-9_.-]+", re.ASCII)


def host() -> Platform:
    """Return the platform of this machine."""
    machine = os.uname().machine
    architecture, variant = _MACHINES.get(machine, (machine, ""))
    return Platform(architecture, "linux", variant)


def parse(text: str) -> Platform:
    """Parse OS/ARCHITECTURE[/VARIANT], or ARCHITECTURE, which means Linux. Raises `UsageError`."""
    words = text.lower().split("/")
    if len(words) == 1:
        words = ["linux", *words]
    if len(words) > 3 or not all(_WORD.fullmatch(word) for word in words):
        raise UsageError(f"{text!r} is not a platform; write OS/ARCHITECTURE[/VARIANT], as in linux/arm64")
    return Platform(_ALIASES.get(words[1], words[1]), words[0], words[2] if len(words) == 3 else "")


def matches(wanted: Platform, found: Platform) -> bool:
    """Return whether an image for `found` runs on `wanted`; a variant that either does not name matches any."""
    return (found.os, found.architecture) == (wanted.os, wanted.architecture) and (
        not wanted.variant or not found.variant or found.variant in _variants(wanted)
    )


def _variants(wanted: Platform) -> Sequence[str]:
    """Return the variants that run on `wanted`, best first: an ARM processor runs code for older ones."""
    if wanted.architecture == "arm" and wanted.variant in ("v5", "v6", "v7", "v8"):
        return [f"v{number}" for number in range(int(wanted.variant[1]), 4, -1)]
    return [wanted.variant]


def choose(index: Index, wanted: Platform, what: str) -> Descriptor:
    """Return the descriptor in an index for a platform. Raises `UserError`, which lists the platforms that it has."""
    fitting = [each for each in index.manifests if each.platform is not None and matches(wanted, each.platform)]
    if fitting:
        return min(fitting, key=lambda each: _rank(wanted, each.platform or Platform()))
    if len(index.manifests) == 1 and index.manifests[0].platform is None:
        return index.manifests[0]
    offered = {str(each.platform) for each in index.manifests if each.platform is not None}
    raise UserError(f"{what} is not for {wanted}; it has {listed(offered)}: choose one with --platform")


def _rank(wanted: Platform, found: Platform) -> int:
    """Return the order of preference: the exact variant, then older ones, then no variant."""
    variants = list(_variants(wanted))
    return variants.index(found.variant) if found.variant in variants else len(variants)
