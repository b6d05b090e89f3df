"""Hub Gateway: a multi-tenant gateway for remote Jupyter kernels, as a JupyterHub service."""

from hub_gateway._version import __version__

__all__ = ["__version__"]
