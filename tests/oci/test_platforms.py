"""Parsing platforms, and choosing the image for one."""

import pytest

from overlayfs.errors import UsageError, UserError
from overlayfs.oci import platforms
from overlayfs.oci.image_spec import OCI_MANIFEST, Descriptor, Index, Platform


def index(*names: str | None) -> Index:
    return Index(
        2,
        tuple(
            Descriptor(
                OCI_MANIFEST, f"sha256:{number:064x}", 1, platform=None if name is None else platforms.parse(name)
            )
            for number, name in enumerate(names)
        ),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("linux/amd64", Platform("amd64", "linux")),
        ("arm64", Platform("arm64", "linux")),
        ("Linux/x86_64", Platform("amd64", "linux")),
        ("linux/arm/v7", Platform("arm", "linux", "v7")),
    ],
)
def test_parsed(text: str, expected: Platform) -> None:
    assert platforms.parse(text) == expected


@pytest.mark.parametrize("text", ["", "linux/", "a/b/c/d", "linux/am d64", "linux/\n"])
def test_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a platform"):
        platforms.parse(text)


@pytest.mark.parametrize(
    ("offered", "wanted", "chosen"),
    [
        (("linux/arm64", "linux/amd64", "linux/386"), "linux/amd64", 1),
        (("linux/amd64", "linux/amd64"), "linux/amd64", 0),
        (("linux/arm/v5", "linux/arm/v6", "linux/arm/v7"), "linux/arm/v7", 2),
        (("linux/arm/v5", "linux/arm/v6", "linux/arm/v7"), "linux/arm/v6", 1),
        (("linux/arm/v5", "linux/arm"), "linux/arm/v7", 0),
        (("linux/arm64", "linux/arm64/v8"), "linux/arm64/v8", 1),
        (("linux/arm64/v8",), "linux/arm64", 0),
        ((None,), "linux/amd64", 0),
    ],
)
def test_chosen(offered: tuple[str | None, ...], wanted: str, chosen: int) -> None:
    found = index(*offered)
    assert platforms.choose(found, platforms.parse(wanted), "it") is found.manifests[chosen]


@pytest.mark.parametrize("wanted", ["linux/s390x", "windows/amd64", "linux/arm/v6"])
def test_a_missing_platform_is_reported_with_those_that_exist(wanted: str) -> None:
    offered = index("linux/amd64", "linux/arm/v7", "unknown/unknown", "linux/amd64")
    with pytest.raises(UserError, match=f"it is not for {wanted}; it has linux/amd64, linux/arm/v7, unknown/unknown: "):
        platforms.choose(offered, platforms.parse(wanted), "it")


def test_an_index_of_several_without_platforms_is_refused() -> None:
    with pytest.raises(UserError, match="it has none"):
        platforms.choose(index(None, None), platforms.host(), "it")


def test_the_host_is_a_linux_platform() -> None:
    assert platforms.host().os == "linux" and platforms.host().architecture
