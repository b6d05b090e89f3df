"""Where the files lie that are part of the distribution and not Python modules of the package.

In a checkout they are directories of the top level (`launchers/`, `migrations/`, ...); in an
installed wheel they lie inside the package (`hub_gateway/_launchers`, ...), where setup.py puts them.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["jupyterhub_config_dir", "kernelspecs_dir", "launchers_dir", "migrations_dir"]

_PACKAGE = Path(__file__).resolve().parent


def _find(name: str) -> Path:
    """The directory `name`: the packaged one, or else that of the checkout."""
    # The packaged one first: a directory `migrations` beside an installed package is somebody else's.
    packaged = _PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def jupyterhub_config_dir() -> Path:
    """The directory of configuration files for a JupyterHub that runs with the gateway."""
    return _find("jupyterhub_config")


def launchers_dir() -> Path:
    """The directory of agent.py and the launchers, which are shipped to the kernel's node."""
    return _find("launchers")


def kernelspecs_dir() -> Path:
    """The directory of the sample kernelspecs: one folder each, as in a Jupyter `kernels` directory."""
    return _find("kernelspecs")


def migrations_dir() -> Path:
    """The directory of the Alembic environment (env.py and versions/)."""
    return _find("migrations")
