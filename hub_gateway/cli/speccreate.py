"""`jupyter hubgateway kernelspec create|install`: kernelspecs for a site, from a sample or from a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jupyter_core.paths import SYSTEM_JUPYTER_PATH, jupyter_data_dir
from traitlets import Bool, Float, Integer, List, Unicode

from hub_gateway._paths import kernelspecs_dir
from hub_gateway.app import HubGateway
from hub_gateway.cli.base import Command
from hub_gateway.cli.check import line
from hub_gateway.cli.client import cell, text_of
from hub_gateway.cli.files import Content, contents_of, write_folder
from hub_gateway.errors import BadRequest, NotFound
from hub_gateway.kernels.speccheck import SpecChecker
from hub_gateway.kernels.specfile import read_document
from hub_gateway.kernels.specs import KernelSpecFiles, KernelSpecs
from hub_gateway.proxies.registry import PROXIES, Proxies

__all__ = ["KernelspecCreate", "KernelspecInstall"]

FILE = "kernel.json"


class _Writing(Command):
    """A command that writes a kernelspec to where gateways look for them."""

    takes_arguments = True
    aliases = {
        **Command.aliases,
        "name": "_Writing.kernel_name",
        "prefix": "_Writing.prefix",
        "directory": "_Writing.directory",
    }
    flags = {
        **Command.flags,
        "user": ({"_Writing": {"user": True}}, "Into your own account's Jupyter directory."),
        "sys-prefix": ({"_Writing": {"sys_prefix": True}}, "Into the Jupyter directory of this Python environment."),
        "replace": ({"_Writing": {"replace": True}}, "Write over a kernelspec that is there."),
    }

    kernel_name = Unicode(
        help="""Name of the kernelspec: that of its folder, by which limits and notebooks know it.

        By default that of the sample, or of the folder that is installed.
        """
    ).tag(config=True)
    prefix = Unicode(help="Write to share/jupyter/kernels below this directory.").tag(config=True)
    directory = Unicode(
        help="""Write to this directory of kernelspecs.

        Without this and the like, the first one of `c.KernelSpecManager.kernel_dirs`, or else where `jupyter kernelspec
        install` puts them for all users.
        """
    ).tag(config=True)
    user = Bool(False, help="Into your own account's Jupyter directory.").tag(config=True)
    sys_prefix = Bool(False, help="Into the Jupyter directory of this Python environment.").tag(config=True)
    replace = Bool(False, help="Write over a kernelspec that is there.").tag(config=True)

    def target(self, gateway: HubGateway) -> Path:
        """The directory of kernelspecs to write to."""
        given = {"--prefix": self.prefix, "--sys-prefix": self.sys_prefix, "--user": self.user}
        chosen = [option for option, value in {**given, "--directory": self.directory}.items() if value]
        if len(chosen) > 1:
            self.fail(f"{' and '.join(chosen)} are two places", "give one of them")
        below = Path("share", "jupyter", "kernels")
        if self.directory:
            return Path(self.directory).expanduser().absolute()
        if self.prefix:
            return Path(self.prefix).expanduser().absolute() / below
        if self.sys_prefix:
            return Path(sys.prefix) / below
        if self.user:
            return Path(jupyter_data_dir()) / "kernels"
        configured = gateway.config.KernelSpecManager.get("kernel_dirs")
        return Path(configured[0]).expanduser() if configured else Path(SYSTEM_JUPYTER_PATH[0]) / "kernels"

    def write(self, name: str, files: Mapping[str, Content], document: dict[str, Any], source: Path) -> int:
        """Check it, then write it; the exit code. Nothing is written where there is an error."""
        gateway = self.gateway()
        proxies = Proxies(parent=gateway, state_dir=gateway.state_dir)
        checker = SpecChecker(KernelSpecs(parent=gateway, base_url=gateway.base_url), proxies)
        found = list(checker.document(document, name, source))
        for finding in found:
            print(cell(line(finding)), file=sys.stderr)
        if any(finding.level == "error" for finding in found):
            self.fail("nothing was written")
        folder = self.target(gateway) / name
        write_folder(folder, files, last=FILE, replace=self.replace)
        print(folder / FILE)
        self._seen(gateway, name, folder)
        return 0

    def _seen(self, gateway: HubGateway, name: str, folder: Path) -> None:
        """Say where the gateway would not find it, or not offer it."""
        there = KernelSpecFiles(parent=gateway).find_kernel_specs().get(name)
        if there is None:
            hint = f"c.KernelSpecManager.kernel_dirs = [{str(folder.parent)!r}]"
            print(f"warning: the gateway does not look there -> {hint}", file=sys.stderr)
        elif Path(there).resolve() != folder.resolve():
            print(f"warning: {there} is used in its place, as it is found first -> remove one of them", file=sys.stderr)
        elif not KernelSpecs(parent=gateway).offers(name):
            print(f"warning: it is not offered -> add {name} to c.KernelSpecs.allowed_kernelspecs", file=sys.stderr)


class KernelspecCreate(_Writing):
    """Write a kernelspec from a sample, with what the options say in its place, and print where it is.

    It is checked first, as `kernelspec validate` does it; with an error nothing is written. What is there already is
    left alone without `--replace`.
    """

    name = "jupyter-hubgateway-kernelspec-create"
    description = __doc__
    examples = """
    jupyter hubgateway kernelspec create --proxy=docker --name=python --image=registry.example.org/kernels/python:1
    jupyter hubgateway kernelspec create --proxy=distributed --hosts=node1,node2 --cpu=2 --memory=8G --max-memory=32G
    jupyter hubgateway kernelspec create --proxy=local --directory=/etc/hub-gateway/kernels --env=OMP_NUM_THREADS=2
    """
    aliases = {
        **_Writing.aliases,
        **{
            name.replace("_", "-"): f"KernelspecCreate.{name}"
            for name in (
                *("proxy", "language", "sample", "display_name", "image", "hosts", "cpu", "memory", "gpu", "gpu_model"),
                *("queue", "max_cpu", "max_memory", "max_gpu", "env", "group", "launch_timeout", "cull_idle_timeout"),
                *("proxy_config", "profiles"),
            )
        },
    }

    proxy = Unicode("local", help=f"What runs its kernels: {', '.join(PROXIES)}.").tag(config=True)
    language = Unicode("python", help="The language of the sample.").tag(config=True)
    sample = Unicode(help="A sample by its name; by default the one for `--proxy` and `--language`.").tag(config=True)
    display_name = Unicode(help="What the launcher shows.").tag(config=True)
    image = Unicode(help="The image of its containers.").tag(config=True)
    hosts = List(Unicode(), help="Hosts of `DistributedProxy.hosts`, with commas between or repeated.").tag(config=True)
    cpu = Float(None, allow_none=True, help="Cores that each kernel takes.").tag(config=True)
    memory = Unicode(help="Memory that each kernel takes: 4G.").tag(config=True)
    gpu = Integer(None, allow_none=True, help="GPUs that each kernel takes.").tag(config=True)
    gpu_model = Unicode(help="Their model.").tag(config=True)
    queue = Unicode(help="The queue or namespace.").tag(config=True)
    max_cpu = Float(None, allow_none=True, help="The most cores that a user may wish for; by default none more.").tag(
        config=True
    )
    max_memory = Unicode(help="The most memory that a user may wish for; by default none more.").tag(config=True)
    max_gpu = Integer(None, allow_none=True, help="The most GPUs that a user may wish for; by default none more.").tag(
        config=True
    )
    env = List(Unicode(), help="NAME=VALUE for the kernel's environment; the option may be repeated.").tag(config=True)
    group = List(Unicode(), help="A group that is offered it; may be repeated. By default everybody is.").tag(
        config=True
    )
    launch_timeout = Float(None, allow_none=True, help="How long (seconds) a launch may take.").tag(config=True)
    cull_idle_timeout = Float(
        None, allow_none=True, help="After how long (seconds) idle kernels are stopped; 0 is never."
    ).tag(config=True)
    proxy_config = Unicode(
        help="""More of `metadata.process_proxy.config`, as a JSON object:

            {"network": "kernels"}
        """
    ).tag(config=True)
    profiles = Unicode(help="A file with a JSON list of profiles; - is standard input.").tag(config=True)

    def run(self) -> int:
        """Put it together, check it, write it."""
        if self.extra_args:
            self.fail(f"{self.extra_args[0]!r} is no option", f"the name is given by --name; see {self.name} --help")
        source = sample_of(self.sample) if self.sample else sample_for(self.language, self.proxy)
        document = read_document(source)
        self._change(document)
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        files = {**contents_of(source), FILE: Content(text.encode())}
        return self.write(self.kernel_name or source.name, files, document, source)

    def _change(self, document: dict[str, Any]) -> None:
        """Put into the sample what the options say."""
        metadata = document.setdefault("metadata", {})
        stanza, options = metadata.setdefault("process_proxy", {}), metadata.get("hub_gateway", {})
        config = {**stanza.get("config", {}), **self._more()}
        if self.image:
            config["image_name"] = self._for("--image", "image_name", stanza, self.image)
        if self.hosts:
            config["hosts"] = self._for("--hosts", "hosts", stanza, _split(self.hosts))
        if config:
            stanza["config"] = config
        if self.display_name:
            document["display_name"] = self.display_name
        if self.env:
            document["env"] = {**document.get("env", {}), **dict(self._variable(one) for one in self.env)}
        self._sizes(options)
        times = {"launch_timeout": self.launch_timeout, "cull_idle_timeout": self.cull_idle_timeout}
        options |= {key: _plain(seconds) for key, seconds in times.items() if seconds is not None}
        if self.group:
            options["groups"] = _split(self.group)
        if self.profiles:
            options["profiles"] = self._json(text_of(self.profiles), "--profiles", list)
        if options:
            metadata["hub_gateway"] = options

    def _for(self, option: str, key: str, stanza: Mapping[str, Any], value: Any) -> Any:
        """The value of an option, which must be for the sample's process proxy."""
        name = str(stanza.get("name"))
        known = PROXIES[name].config_keys if name in PROXIES else None
        if known is not None and key not in known:
            self.fail(f"{option} is not for kernels of {name}", "choose another --proxy")
        return value

    def _sizes(self, options: dict[str, Any]) -> None:
        """What is given is the size; the sample's own bounds are for the sample's sizes."""
        names = ("cpu", "memory", "gpu")
        usual = {name: getattr(self, name) for name in (*names, "gpu_model", "queue")}
        usual = {name: _plain(value) for name, value in usual.items() if value not in (None, "")}
        most = {name: getattr(self, f"max_{name}") for name in names}
        most = {name: _plain(value) for name, value in most.items() if value not in (None, "")}
        before = {name: value for name, value in options.get("resources_max", {}).items() if name not in usual}
        for key, value in (("resources", {**options.get("resources", {}), **usual}), ("resources_max", before | most)):
            options.pop(key, None)
            if value:
                options[key] = value

    def _variable(self, text: str) -> tuple[str, str]:
        name, equals, value = text.partition("=")
        if not equals:
            self.fail(f"--env={text} names no value", "write --env=NAME=VALUE")
        return name, value

    def _more(self) -> dict[str, Any]:
        found: dict[str, Any] = self._json(self.proxy_config, "--proxy-config", dict) if self.proxy_config else {}
        return found

    def _json(self, text: str, option: str, kind: type) -> Any:
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, kind):
            self.fail(f"{option} is no JSON {'list' if kind is list else 'object'}", f"see {self.name} --help")
        return found


class KernelspecInstall(_Writing):
    """Install a sample, or a kernelspec's folder, where the gateway finds it: `kernelspec install NAME | DIRECTORY`.

    It is checked first, as `kernelspec validate` does it; with an error nothing is written.
    """

    name = "jupyter-hubgateway-kernelspec-install"
    description = __doc__
    examples = """
    jupyter hubgateway kernelspec install python_local --directory=/etc/hub-gateway/kernels
    jupyter hubgateway kernelspec install ./my_kernel --name=python_ours --replace
    """

    def run(self) -> int:
        """Copy its files."""
        given = self.argument("the name of a sample, or the directory of a kernelspec")
        folder = Path(given).expanduser()
        source = folder.resolve() if (folder / FILE).is_file() else sample_of(given)
        name = self.kernel_name or source.name.lower()  # as Jupyter reads it
        return self.write(name, contents_of(source), read_document(source), source)


def sample_of(name: str) -> Path:
    """A sample by its name. Raises `NotFound`."""
    known = sorted(path.parent.name for path in kernelspecs_dir().glob(f"*/{FILE}"))
    if name not in known:
        raise NotFound(f"{name[:200]} is neither a sample nor a folder with a {FILE}; samples: {', '.join(known)}.")
    return kernelspecs_dir() / name


def sample_for(language: str, proxy: str) -> Path:
    """The sample of a language for a process proxy. Raises `BadRequest`."""
    found: dict[tuple[str, str], Path] = {}
    for file in sorted(kernelspecs_dir().glob(f"*/{FILE}")):
        document = read_document(file.parent)
        stanza = document.get("metadata", {}).get("process_proxy", {})
        # Of several, the one with the plainest name is the one without specialities.
        found.setdefault((str(document.get("language", "")).lower(), str(stanza.get("name"))), file.parent)
    if (language.lower(), proxy) not in found:
        known = ", ".join(f"{name} for {kind}" for name, kind in sorted(found))
        raise BadRequest(f"There is no sample of {language[:64]!r} for {proxy[:64]!r}; there is {known}.")
    return found[language.lower(), proxy]


def _split(given: list[str]) -> list[str]:
    """What was given as several options, or with commas between."""
    return [name.strip() for one in given for name in one.split(",") if name.strip()]


def _plain(value: Any) -> Any:
    """A number as people write it: 2, not 2.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
