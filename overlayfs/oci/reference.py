"""Names of images in registries: REGISTRY/REPO[:TAG][@DIGEST].

The grammar is that of the distribution project (``reference``), which podman, skopeo and docker share. The registry is
required: no list of registries is searched, so that a name always means the same image.
"""

import dataclasses
import ipaddress
import re

from overlayfs.errors import UsageError
from overlayfs.oci.image_spec import is_digest

DEFAULT_TAG = "latest"
LONGEST_NAME = 255  # characters of registry and repository together
DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*", re.ASCII)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """An image in a registry, by its tag or by its digest; `registry` is HOST[:PORT] as it was written."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @property
    def target(self) -> str:
        """What to request from the registry: the digest if there is one, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    @property
    def host(self) -> str:
        """HOST[:PORT] of the registry's server; for Docker Hub this is not the name of the registry."""
        return "registry-1.docker.io" if self.registry in DOCKER_HUB else self.registry

    @property
    def name(self) -> str:
        """The reference without tag and digest."""
        return f"{self.registry}/{self.repository}"

    def __str__(self) -> str:
        """Return the reference as users write it."""
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.name}{tag}@{self.digest}" if self.digest else f"{self.name}{tag}"


def parse(text: str) -> Reference:
    """Parse a reference; without a tag and a digest, the tag is `latest`. Raises `UsageError`."""
    rest, _, digest = text.removeprefix("docker://").partition("@")
    if "@" in text and not is_digest(digest):
        raise UsageError(f"{text}: a digest is sha256: and 64 hexadecimal digits in lower case")
    name, tag = _split_tag(rest)
    if tag is not None and not _TAG.fullmatch(tag):
        raise UsageError(f"{text}: a tag is up to 128 letters, digits, '.', '_' and '-'")
    registry, repository = _split_registry(text, name)
    return Reference(registry, repository, tag or (None if digest else DEFAULT_TAG), digest or None)


def image_name(reference: Reference) -> str:
    """Return the default name in a store for an image from a registry. Raises `UsageError` without a tag."""
    if reference.tag is None:
        raise UsageError(f"{reference}: a digest is not a name; give the image one with -t")
    return f"{reference.name}:{reference.tag}"


def is_loopback(host: str) -> bool:
    """Return whether HOST or HOST:PORT names this machine, without asking a name server."""
    name = _without_port(host)
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host


def _split_tag(text: str) -> tuple[str, str | None]:
    """Split off the tag: a colon after the last slash begins a tag, one before it a port."""
    last = text.rpartition("/")[2]
    if ":" not in last:
        return text, None
    name, _, tag = text.rpartition(":")
    return name, tag


def _split_registry(text: str, name: str) -> tuple[str, str]:
    registry, slash, repository = name.partition("/")
    if not slash or not _looks_like_host(registry):
        raise UsageError(f"{text}: name the registry too, as in docker.io/library/{name or 'NAME'}")
    if not _REGISTRY.fullmatch(registry):
        raise UsageError(f"{text}: {registry} is not the HOST[:PORT] of a registry")
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"{text}: a repository is lower-case letters and digits, separated by '/', '.', '_' or '-'")
    if registry in DOCKER_HUB:
        registry, repository = DOCKER_HUB[0], repository if "/" in repository else f"library/{repository}"
    if len(registry) + 1 + len(repository) > LONGEST_NAME:
        raise UsageError(f"{text}: registry and repository are longer than {LONGEST_NAME} characters")
    return registry.lower(), repository


def _looks_like_host(word: str) -> bool:
    """Return whether a first component is a registry, by docker's rule: `localhost`, or with a dot or a port."""
    return word == "localhost" or "." in word or ":" in word
