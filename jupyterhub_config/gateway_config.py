"""The gateway's own configuration, for kernels on its own machine: a start for jupyter_hubgateway_config.py.

Every option, with its help: `jupyter hubgateway --help-all`, or docs/reference/options.
"""

c = get_config()

# What outlives the gateway: its database (SQLite, unless db_url says otherwise), keys, logs of kernels.
c.HubGateway.state_dir = "/var/lib/hub-gateway"

# Which kernels there are: directories with one folder for each kernelspec.
c.KernelSpecManager.kernel_dirs = ["/etc/hub-gateway/kernels"]
# Not also the Python that happens to run the gateway.
c.KernelSpecManager.ensure_native_kernel = False

# Which of the client's environment variables reach kernels, besides KERNEL_*.
# c.KernelService.client_envs = ["MLFLOW_TRACKING_URI"]
