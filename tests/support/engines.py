"""The engine that serves our mounts in this run: the program's choice, unless `--engine` names one."""

KERNEL, PYFUSE3 = "kernel", "pyfuse3"
NAMES = (KERNEL, PYFUSE3)

_asked: str | None = None


def choose(name: str | None) -> None:
    """Serve every mount without an engine option by this engine; None leaves the choice to the program."""
    global _asked  # noqa: PLW0603 - one run has one answer, and drivers are made far from pytest's configuration
    _asked = name


def asked() -> str | None:
    """Return the engine that `--engine` names, or None."""
    return _asked


def current() -> str:
    """Return the engine of a mount without an engine option: the kernel engine on every kernel that tests run on."""
    return _asked or KERNEL


def option(prefix: str = "") -> str:
    """Return an option string with `engine=NAME` appended to `prefix` if an engine is chosen."""
    words = [prefix] if prefix else []
    return ",".join(words if _asked is None else [*words, f"engine={_asked}"])
