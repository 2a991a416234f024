"""Sides of a registry with their stores, and images as other programs push them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from overlayfs.oci import image_spec, platforms
from overlayfs.oci.credentials import Credential
from overlayfs.oci.http_client import HttpClient, RetryPolicy
from overlayfs.oci.image_spec import digest_of
from overlayfs.oci.pull import Pulled, pull
from overlayfs.oci.push import Pushed, push
from overlayfs.oci.reference import Reference, parse
from overlayfs.oci.registry import BlobSource, Repository
from overlayfs.oci.transfer import LayerProgress
from overlayfs.store.store import LayerStore
from tests.store.samples import there

BASE = {"etc/motd": "hello\n", "usr/lib/big": "".join(f"{number}\n" for number in range(200_000))}
TOP = {"etc/motd": "bye\n"}


class Side:
    """A store, and push and pull with it; backoffs take no time and are recorded in `waits`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        self.store = LayerStore(os.fsencode(place / "store"))
        self.waits: list[float] = []
        self.steps: list[LayerProgress] = []
        self.find: Callable[[Reference], Credential | None] = lambda _: None

    def _client(self) -> HttpClient:
        return HttpClient(plain_http=True, retry=RetryPolicy(attempts=4, wait=self.waits.append, jitter=lambda: 1.0))

    def pull(self, text: str, name: str = "it", platform: str | None = None) -> Pulled:
        wanted = None if platform is None else platforms.parse(platform)
        with self._client() as client:
            return pull(
                self.store, parse(text), name=name, client=client, platform=wanted, find=self.find,
                progress=self.steps.append,
            )  # fmt: skip

    def push(self, name: str, text: str) -> Pushed:
        with self._client() as client:
            return push(self.store, name, parse(text), client=client, find=self.find, progress=self.steps.append)

    def files(self, name: str = "it") -> list[dict[str, str]]:
        """The regular files of each layer, top first."""
        return [_files(Path(os.fsdecode(layer.tree_path))) for layer in self.store.stack_of(name)]

    def is_clean(self) -> bool:
        """Whether the store has no unfinished files."""
        rooms = there(self.place)
        return not rooms["staging"] and not rooms["trash"]


def _files(tree: Path) -> dict[str, str]:
    return {str(path.relative_to(tree)): path.read_text() for path in sorted(tree.rglob("*")) if path.is_file()}


def same(left: Side, right: Side) -> bool:
    return left.files() == right.files() == [TOP, BASE]


def foreign(host: str, repository: str, **words: Any) -> str:
    """Upload an image as Docker does: other media types, other compression, unknown members; return its digest."""
    with HttpClient(plain_http=True) as client:
        target = Repository(client, parse(f"{host}/{repository}"), lambda: None, push=True)

        def upload(data: bytes) -> tuple[str, int]:
            target.upload(BlobSource(digest_of(data), len(data), lambda: iter((data,))))
            return digest_of(data), len(data)

        tar = _tar()
        layer, size = upload(_gzip(tar))
        config = {
            "architecture": words.get("architecture", "amd64"), "os": "linux", "docker_version": "1", "x": [1.50],
            "rootfs": {"type": "layers", "diff_ids": words.get("diff_ids", [digest_of(tar)])},
            "config": {"Env": ["A=b"], "Labels": {"l": "m"}}, "created": "2020-01-02T03:04:05.678901234Z",
            "history": [{"created": "2020-01-02T03:04:05Z", "created_by": "ADD x"},
                        {"created": "2020-01-02T03:04:06Z", "created_by": "CMD", "empty_layer": True}],
        }  # fmt: skip
        config_digest, config_size = upload(json.dumps(config, indent=3).encode())
        manifest = {
            "schemaVersion": 2, "mediaType": image_spec.DOCKER_MANIFEST,
            "config": {"mediaType": words.get("config_type", image_spec.DOCKER_CONFIG), "size": config_size,
                       "digest": config_digest},
            "layers": [{"mediaType": words.get("layer_type", image_spec.DOCKER_LAYER_GZIP), "size": size,
                        "digest": layer}],
        }  # fmt: skip
        return target.put_manifest(
            words.get("tag", "latest"), image_spec.DOCKER_MANIFEST, json.dumps(manifest, indent=1).encode()
        )


def _tar() -> bytes:
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as file:
        member = tarfile.TarInfo("./etc/motd")
        member.size = 6
        file.addfile(member, io.BytesIO(b"hello\n"))
    return buffer.getvalue()


def _gzip(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data, 1, mtime=7)


def biggest(here: Side, server: str, repository: str) -> str:
    """Push the image and return the digest of its largest blob."""
    pushed = here.push("it", f"{server}/{repository}")
    return max(pushed.layers, key=lambda layer: layer.size).digest
