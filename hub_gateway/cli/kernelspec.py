"""`jupyter hubgateway kernelspec`: what kernels are started from."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from traitlets import Bool

from hub_gateway.app import HubGateway
from hub_gateway.cli.base import Command, Group
from hub_gateway.cli.check import line
from hub_gateway.cli.client import cell, print_table
from hub_gateway.cli.speccreate import KernelspecCreate, KernelspecInstall
from hub_gateway.errors import BadRequest, NotFound
from hub_gateway.kernels.profiles import SEPARATOR
from hub_gateway.kernels.speccheck import SpecChecker
from hub_gateway.kernels.specs import KernelSpecs, Spec
from hub_gateway.proxies.base import Finding
from hub_gateway.proxies.registry import Proxies
from hub_gateway.quotas.amounts import shown
from hub_gateway.quotas.types import Resource

__all__ = ["Kernelspec", "KernelspecList", "KernelspecValidate"]


def catalogue(gateway: HubGateway) -> KernelSpecs:
    """The gateway's kernelspecs. What is wrong with them the commands say themselves, and not a log."""
    made = KernelSpecs(parent=gateway, base_url=gateway.base_url)
    made.log = made.manager.log = logging.Logger("kernelspecs")
    made.log.addHandler(logging.NullHandler())
    return made


class _Local(Command):
    """A command that reads kernelspecs as the gateway of this configuration does."""

    flags = {**Command.flags, "json": ({"_Local": {"as_json": True}}, "Print JSON, for programs.")}
    as_json = Bool(False, help="Print JSON, for programs.").tag(config=True)


class KernelspecList(_Local):
    """List what the gateway offers, and what is left out and why.

    Run it with the gateway's configuration file: it looks where the gateway looks. Profiles are entries of their own.
    """

    name = "jupyter-hubgateway-kernelspec-list"
    description = __doc__
    examples = """
    jupyter hubgateway kernelspec list
    jupyter hubgateway kernelspec list --json
    """

    def run(self) -> int:
        """A table, then what is broken."""
        gateway = self.gateway()
        specs, broken = asyncio.run(catalogue(gateway).everything())
        registry = Proxies(parent=gateway, state_dir=gateway.state_dir)
        offered, why_not = [], dict(broken)
        for name, spec in specs.items():
            try:
                offered.append(_described(spec, registry.resolve(spec.proxy)))
            except BadRequest as error:
                why_not[name] = error.message
        if self.as_json:
            print(json.dumps({"kernelspecs": offered, "broken": why_not}, indent=2))
            return 0
        if offered:
            head = ["kernelspec", "display name", "proxy", "cpu", "memory", "gpu", "for"]
            print_table([head, *(_row(one) for one in offered)])
        else:
            print("No kernelspecs.")
        for name, why in sorted(why_not.items()):
            print(line(Finding("error", cell(name), cell(why), "jupyter hubgateway kernelspec validate")))
        return 0


class KernelspecValidate(_Local):
    """Say what is wrong with kernelspecs, one line each, and what to do: `kernelspec validate [NAME | DIRECTORY]`.

    Without an argument it looks at all that the gateway finds. Profiles are checked too, and images and hosts are held
    against the gateway's configuration. The exit code is 1 if there is an error.
    """

    takes_arguments = True
    name = "jupyter-hubgateway-kernelspec-validate"
    description = __doc__
    examples = """
    jupyter hubgateway kernelspec validate
    jupyter hubgateway kernelspec validate python_docker
    jupyter hubgateway kernelspec validate ./python_docker
    """

    def run(self) -> int:
        """Print the findings."""
        gateway = self.gateway()
        specs = catalogue(gateway)
        checker = SpecChecker(specs, Proxies(parent=gateway, state_dir=gateway.state_dir))
        found: list[Finding] = []
        for name, directory in self._wanted(specs).items():
            said = list(checker.directory(directory, name))
            if name in specs.manager.find_kernel_specs() and not specs.offers(name):
                hint = "add it to c.KernelSpecs.allowed_kernelspecs"
                said.append(Finding("warning", name, "it is not offered", hint))
            found += said or [Finding("ok", name, str(directory))]
        if self.as_json:
            print(json.dumps([asdict(finding) for finding in found], indent=2))
        else:
            for finding in found:
                print(cell(line(finding)))
        return 1 if any(finding.level == "error" for finding in found) else 0

    def _wanted(self, specs: KernelSpecs) -> dict[str, Path]:
        """What to look at: folders by the name of the kernelspec."""
        installed = {name: Path(folder) for name, folder in specs.manager.find_kernel_specs().items()}
        if not self.extra_args:
            if not installed:
                raise NotFound(
                    "No kernelspec was found.", hint="name their directories: c.KernelSpecManager.kernel_dirs = [...]"
                )
            return dict(sorted(installed.items()))
        given = self.argument("the name of a kernelspec, or its directory")
        folder = Path(given).expanduser()
        if os.sep not in given and given in installed:
            return {given: installed[given]}
        if folder.is_dir():
            return {folder.resolve().name.lower(): folder}  # as Jupyter reads it
        base, _, profile = given.rpartition(SEPARATOR)
        if profile and base in installed:
            return {base: installed[base]}
        raise NotFound(
            f"{given[:200]} is neither a directory nor a kernelspec that is installed here; "
            f"installed: {', '.join(sorted(installed)) or 'none'}."
        )


class Kernelspec(Group):
    """Kernelspecs: list, create, install and check what kernels are started from."""

    name = "jupyter-hubgateway-kernelspec"
    description = __doc__
    subcommands = {
        cls.name.rpartition("-")[2]: (cls, cls.__doc__)
        for cls in (KernelspecList, KernelspecCreate, KernelspecInstall, KernelspecValidate)
    }


def _described(spec: Spec, proxy: str) -> dict[str, Any]:
    """An entry, as JSON."""
    model: Any = spec.model
    usual = spec.bounds.usual
    suffix = f"{SEPARATOR}{spec.profile}" if spec.profile else ""
    return {
        "name": spec.name,
        "display_name": model["spec"].get("display_name") or "",
        "language": model["spec"].get("language") or "",
        "proxy": proxy,
        "kernelspec": spec.name.removesuffix(suffix),
        "profile": spec.profile or None,
        "resources": {**asdict(usual), "queue": spec.bounds.queue},
        "resources_max": asdict(spec.bounds.most),
        "groups": None if spec.groups is None else sorted(spec.groups),
        "authorized_users": sorted(spec.authorized_users),
        "directory": spec.resource_dir,
    }


def _row(one: dict[str, Any]) -> list[str]:
    return [cell(part) for part in _cells(one)]


def _cells(one: dict[str, Any]) -> Iterator[Any]:
    yield from (one["name"], one["display_name"], one["proxy"])
    taken = one["resources"]
    yield taken["cpu"] or None
    yield shown(Resource.MEMORY, taken["memory"]) if taken["memory"] else None
    yield f"{taken['gpu']} {taken['gpu_model']}".strip() if taken["gpu"] else None
    groups, users = one["groups"], one["authorized_users"]
    yield ", ".join((*(f"group {name}" for name in groups or ()), *users)) or "everybody"
