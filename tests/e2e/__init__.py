"""The whole way: a real JupyterHub with its proxy, the gateway as its service, real single-user servers."""
