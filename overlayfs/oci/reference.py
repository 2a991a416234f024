"""Names of images in registries: REGISTRY/REPO[:TAG][@DIGEST].

The grammar is that of the distribution project, which podman, skopeo and docker share.  A registry is always named:
there is no list of registries to search, so a name cannot mean another image tomorrow.
"""

import dataclasses
import ipaddress
import re

from overlayfs.errors import UsageError

DEFAULT_TAG = "latest"
LONGEST_NAME = 255  # characters of registry and repository together
DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*", re.ASCII)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """An image in a registry, or with `digest` one certain image; `registry` is HOST[:PORT] as it was written."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @property
    def target(self) -> str:
        """What to ask the registry for: the digest if there is one, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    @property
    def host(self) -> str:
        """HOST[:PORT] that answers for the registry; Docker Hub's own name is not that of its server."""
        return "registry-1.docker.io" if self.registry in DOCKER_HUB else self.registry

    @property
    def name(self) -> str:
        """The reference without tag and digest."""
        return f"{self.registry}/{self.repository}"

    def __str__(self) -> str:
        """Return the reference as a person writes it."""
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.name}{tag}@{self.digest}" if self.digest else f"{self.name}{tag}"


def parse(text: str) -> Reference:
    """Return what a reference names; a tag left out is `latest`, unless a digest says more. Raises `UsageError`."""
    rest, _, digest = text.removeprefix("docker://").partition("@")
    if "@" in text and not is_digest(digest):
        raise UsageError(f"{text}: a digest is sha256: and 64 hexadecimal digits in lower case")
    name, tag = _split_tag(rest)
    if tag is not None and not _TAG.fullmatch(tag):
        raise UsageError(f"{text}: a tag is up to 128 letters, digits, '.', '_' and '-'")
    registry, repository = _split_registry(text, name)
    return Reference(registry, repository, tag or (None if digest else DEFAULT_TAG), digest or None)


def image_name(reference: Reference) -> str:
    """Return what an image is called in a store unless its user says otherwise. Raises `UsageError` without a tag."""
    if reference.tag is None:
        raise UsageError(f"{reference}: a digest is no name; give the image one with -t")
    return f"{reference.name}:{reference.tag}"


def is_digest(text: str) -> bool:
    """Whether a text is a digest we know to check: sha256, in the only spelling that is allowed."""
    return _DIGEST.fullmatch(text) is not None


def is_loopback(host: str) -> bool:
    """Whether HOST or HOST:PORT is this machine by its very name, without asking a name server."""
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
    """A colon behind the last slash begins a tag; one before it, a port."""
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
        raise UsageError(f"{text}: a repository is lower-case words and digits, parted by '/', '.', '_' or '-'")
    if registry in DOCKER_HUB:
        registry, repository = DOCKER_HUB[0], repository if "/" in repository else f"library/{repository}"
    if len(registry) + 1 + len(repository) > LONGEST_NAME:
        raise UsageError(f"{text}: registry and repository are longer than {LONGEST_NAME} characters")
    return registry.lower(), repository


def _looks_like_host(word: str) -> bool:
    """The rule of podman and docker: `localhost`, or something with a dot or a port."""
    return word == "localhost" or "." in word or ":" in word
