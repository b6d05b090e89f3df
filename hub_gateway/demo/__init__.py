"""`jupyter hubgateway demo`: a whole JupyterHub with the gateway on one machine."""
