"""Which release of Lorry this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def release() -> str:
    """ "lorry 0.1.0", as ``--version`` prints it."""
    try:
        return f"lorry {version('lorry')}"
    except PackageNotFoundError:
        return "lorry, not installed as a package"
