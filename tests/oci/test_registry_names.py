"""Names of images in registries, valid and invalid."""

import pytest

from overlayfs.errors import UsageError
from overlayfs.oci.reference import Reference, is_loopback, parse

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:5055/bb:9", Reference("127.0.0.1:5055", "bb", "9")),
        ("localhost/a/b-c/d__e.f", Reference("localhost", "a/b-c/d__e.f", "latest")),
        ("quay.io/x/y", Reference("quay.io", "x/y", "latest")),
        (f"quay.io/x/y@{DIGEST}", Reference("quay.io", "x/y", None, DIGEST)),
        (f"quay.io/x/y:1@{DIGEST}", Reference("quay.io", "x/y", "1", DIGEST)),
        ("docker://quay.io:443/x:V_1.2-3", Reference("quay.io:443", "x", "V_1.2-3")),
        ("[::1]:5000/x", Reference("[::1]:5000", "x", "latest")),
        ("Registry.Example.org/x", Reference("registry.example.org", "x", "latest")),
        ("docker.io/alpine", Reference("docker.io", "library/alpine", "latest")),
        ("index.docker.io/me/mine", Reference("docker.io", "me/mine", "latest")),
    ],
)
def test_parsed(text: str, expected: Reference) -> None:
    found = parse(text)
    assert found == expected
    assert parse(str(found)) == found


def test_docker_hub_is_served_by_another_host() -> None:
    assert parse("docker.io/alpine").host == "registry-1.docker.io"
    assert parse("quay.io:1/x").host == "quay.io:1"


def test_the_digest_is_requested_rather_than_the_tag() -> None:
    assert parse(f"quay.io/x:1@{DIGEST}").target == DIGEST
    assert parse("quay.io/x").target == "latest"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("alpine", "name the registry"),
        ("library/alpine:3", "name the registry"),
        ("", "name the registry"),
        ("quay.io/", "a repository is"),
        ("quay.io/Upper", "a repository is"),
        ("quay.io/a//b", "a repository is"),
        ("quay.io/../b", "a repository is"),
        ("quay.io/a?x=1", "a repository is"),
        ("quay.io/a:", "a tag is"),
        ("quay.io/a:.x", "a tag is"),
        ("quay.io/a:" + "x" * 129, "a tag is"),
        ("quay.io/a@sha256:" + "AB" * 32, "a digest is"),
        ("quay.io/a@sha256:../../x", "a digest is"),
        ("quay.io/a@", "a digest is"),
        ("user@quay.io/a", "a digest is"),
        ("-quay.io/a", "is not the HOST"),
        ("quay.io:port/a", "is not the HOST"),
        ("quay.io:1\r\nX: y/a", "is not the HOST"),
        ("quay.io/" + "a" * 250, "longer than 255"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse(text)


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "127.8.9.1:5000", "[::1]", "[::1]:5000"])
def test_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.example", "10.0.0.1:5", "127.0.0.1.example", "[fe80::1]", "0.0.0.0", ""])
def test_other_machines(host: str) -> None:
    assert not is_loopback(host)
