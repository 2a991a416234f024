"""Which engine serves our mounts in this run: the product's choice, unless `--engine` names one."""

KERNEL, PYFUSE3 = "kernel", "pyfuse3"
NAMES = (KERNEL, PYFUSE3)

_asked: str | None = None


def choose(name: str | None) -> None:
    """Serve every mount without an engine option by this engine; None leaves the choice to the program."""
    global _asked  # noqa: PLW0603 - one run has one answer, and drivers are made far from pytest's configuration
    _asked = name


def asked() -> str | None:
    """The engine that `--engine` names."""
    return _asked


def current() -> str:
    """The engine that serves a mount which asks for none: ours on every kernel that the tests run on."""
    return _asked or KERNEL


def option(prefix: str = "") -> str:
    """The words `engine=NAME` after what stands before them in an option string, or only that."""
    words = [prefix] if prefix else []
    return ",".join(words if _asked is None else [*words, f"engine={_asked}"])
