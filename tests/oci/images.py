"""Archives of images for tests, made byte by byte, so that they can be invalid in any way."""

import hashlib
import json

from tests.oci.archives import END, file


def saved(*layers: bytes, wrong_sum: bool = False) -> bytes:
    """Return what ``docker save`` writes for layers, the lowest first, given as entries of their archives.

    wrong_sum: the diff IDs in the configuration are wrong.
    """
    tars = [layer + END for layer in layers]
    sums = ["sha256:" + hashlib.sha256(tar + b"!" * wrong_sum).hexdigest() for tar in tars]
    names = [f"layer{number}.tar" for number in range(len(tars))]
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": sums}}
    manifest = [{"Config": "config.json", "RepoTags": ["sample:1"], "Layers": names}]
    members = [("manifest.json", _json(manifest)), ("config.json", _json(config)), *zip(names, tars, strict=True)]
    return b"".join(file(name.encode(), data) for name, data in members) + END


def _json(document: object) -> bytes:
    return json.dumps(document).encode()
