"""What pyproject.toml cannot say: four directories of the top level travel inside the package.

`hub_gateway._paths` finds them again, in a checkout as in an installed wheel.
"""

from setuptools import find_packages, setup

CARRIED = ("jupyterhub_config", "kernelspecs", "launchers", "migrations")

setup(
    packages=[
        *find_packages(include=["hub_gateway", "hub_gateway.*"]),
        *(f"hub_gateway._{name}" for name in CARRIED),
    ],
    package_dir={f"hub_gateway._{name}": name for name in CARRIED},
    package_data={
        "hub_gateway": ["py.typed", "event_schemas/*"],
        "hub_gateway.web": ["openapi.yaml", "templates/**/*", "static/**/*"],
        **{f"hub_gateway._{name}": ["**/*"] for name in CARRIED},
    },
    exclude_package_data={"": ["__pycache__/*", "**/__pycache__/*", "*.py[cod]"]},
    include_package_data=False,
    zip_safe=False,
)
