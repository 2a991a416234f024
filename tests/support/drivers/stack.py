"""The directories of one stack: created, checked for changes of the lower layers, and removed."""

import os
import shutil
from pathlib import Path

from tests.support.builder import Print, build, fingerprint
from tests.support.spec import Dir, Tree


class Stack:
    """Layers below one base directory, lower ones also elsewhere (`lower_on`).

    `lower` is top first; `upper` and `work` are None for a read-only stack.
    """

    def __init__(
        self, base: Path, lower: list[Tree | Dir], upper: Tree | Dir | None, lower_on: list[Path] | None = None
    ) -> None:
        base.mkdir(parents=True)
        self.base = base
        self.spec = (lower, upper)
        places = lower_on or [base] * len(lower)
        self.lower = [
            self._layer(f"l{number}", tree, place)
            for number, (tree, place) in enumerate(zip(lower, places, strict=True))
        ]
        self.upper = None if upper is None else self._layer("u", upper)
        self.work = None if upper is None else self._layer("w", {})
        self.mountpoint = self._layer("m", {})
        self.freeze_layers()

    def _layer(self, name: str, tree: Tree | Dir, place: Path | None = None) -> Path:
        path = (place or self.base) / name
        path.mkdir()
        build(path, tree)
        return path

    def _prints(self) -> dict[Path, dict[bytes, Print]]:
        return {layer: fingerprint(layer) for layer in self.lower}

    def freeze_layers(self) -> None:
        """Fingerprint the lower layers; from now on any change fails the test."""
        self.prints = self._prints()

    def next_layer(self) -> Path:
        """Return the path for the next committed layer."""
        return self.base / f"s{len(self.lower)}"

    def adopt(self, layer: Path) -> None:
        """Put a committed layer on top of the lower ones, and make a new upper and work directory."""
        self.check_layers()
        self.lower.insert(0, layer)
        for name in ("u", "w"):
            shutil.rmtree(self.base / name, ignore_errors=True)
        self.upper = self._layer("u", {})
        self.work = self._layer("w", {})
        self.freeze_layers()

    def add_layer(self, layer: Path) -> None:
        """Record that the upper has become a layer while the stack was in use."""
        self.check_layers()
        self.lower.insert(0, layer)
        self.freeze_layers()

    def check(self) -> None:
        """Check that no lower layer has changed and nothing is left in the work directory."""
        self.check_layers()
        scratch = self.base / "w" / "work"
        left = os.listdir(scratch) if scratch.is_dir() else []
        assert not left, f"left in the work directory: {left}"

    def check_layers(self) -> None:
        """Check that no lower layer has changed, not even an access time."""
        assert self._prints() == self.prints, "a lower layer was changed"

    def remove(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.base)
