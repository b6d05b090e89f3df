"""What is wrong with a kernelspec, and what to do about it: for `jupyter hubgateway kernelspec validate`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from traitlets import TraitError

from hub_gateway._paths import launchers_dir
from hub_gateway.errors import BadRequest
from hub_gateway.kernels.profiles import OPTIONS, Entry, clash, entries_of
from hub_gateway.kernels.specfile import NAME, filled, read_document
from hub_gateway.kernels.specs import KernelSpecs, Spec
from hub_gateway.proxies.base import Finding, ProcessProxy
from hub_gateway.proxies.local import LocalProxy
from hub_gateway.proxies.registry import Proxies
from hub_gateway.proxies.specconfig import COMMON, ENTERPRISE_GATEWAY

__all__ = ["SpecChecker"]

FIELDS = (
    *("argv", "display_name", "language", "env", "interrupt_mode", "metadata", "kernel_protocol_version"),
    *("name", "mimetype", "resource_dir", "codemirror_mode", "help_links"),
)
"""Jupyter's fields."""
GATEWAY_OPTIONS = (*OPTIONS, "profiles", "transport")
"""What `metadata.hub_gateway` may hold."""
PLACEHOLDERS = ("connection_file", "resource_dir", "prefix", "launchers_dir", "kernel_id", "kernel_name")
LAUNCH_PROTOCOL = ("response_address", "public_key", "port_range", "spark_context_initialization_mode")
"""What Enterprise Gateway fills in for its own launchers."""

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class SpecChecker:
    """Holds kernelspecs against Jupyter's format, ours, and what this gateway has."""

    specs: KernelSpecs
    proxies: Proxies

    def directory(self, directory: Path, name: str) -> Iterator[Finding]:
        """The kernelspec of a folder, under a name. Blocks."""
        try:
            document = read_document(directory)
        except BadRequest as error:
            yield Finding("error", name, error.message, "correct the file")
            return
        yield from self.document(document, name, directory)

    def document(self, document: dict[str, Any], name: str, directory: Path) -> Iterator[Finding]:
        """What would be written as the `kernel.json` of a folder. Blocks."""
        if not NAME.fullmatch(name):
            yield Finding(
                "error",
                name,
                "it is no name for a kernelspec",
                "use lower-case letters, digits and . _ -, not dots alone",
            )
        try:
            whole = filled(document, str(directory))
        except BadRequest as error:
            yield Finding("error", name, error.message, "see docs/reference/kernelspecs.md")
            return
        for finding in (*_fields(document), *_environment(whole["env"]), *_options(whole["metadata"])):
            yield replace(finding, what=f"{name}: {finding.what}")
        said: set[tuple[str, str, str]] = set()
        folders = self.specs.manager.find_kernel_specs()
        for entry in entries_of(name, whole):
            if not entry.why_not:
                entry = replace(entry, why_not=clash(entry, folders))
            for finding in self._entry(entry, directory):
                # What the kernelspec itself does wrong is not said again for each of its profiles.
                key = (finding.level, finding.what, finding.message)
                if key not in said:
                    said.add(key)
                    yield replace(finding, what=f"{entry.name}: {finding.what}")

    def _entry(self, entry: Entry, directory: Path) -> Iterator[Finding]:
        if entry.why_not:
            yield Finding("error", "profile", entry.why_not, "it is not offered until that is corrected")
            return
        try:
            spec = self.specs.spec(entry, str(directory))
        except (BadRequest, KeyError, TypeError, ValueError) as error:
            yield Finding("error", "metadata", str(error), "it is not offered until that is corrected")
            return
        proxy = None
        try:
            resolved = self.proxies.resolve(spec.proxy)
            proxy = self.proxies.get(resolved)
        except BadRequest as error:
            yield Finding("error", "process_proxy", error.message, "name one of these, or see Proxies.extra_proxies")
        except TraitError as error:
            yield Finding("error", "process_proxy", str(error), "correct the gateway's configuration")
        else:
            yield from _config(spec, resolved, proxy)
        yield from _argv(entry.document["argv"], directory, local=isinstance(proxy, LocalProxy))


def _fields(document: Mapping[str, Any]) -> Iterator[Finding]:
    for field in sorted(set(document) - set(FIELDS)):
        yield Finding("warning", field, "Jupyter knows no such field", "remove it, or correct its name")
    for field in ("display_name", "language"):
        if not document.get(field):
            yield Finding("warning", field, "it is missing", "the launcher and notebooks show it")


def _environment(env: Mapping[str, Any]) -> Iterator[Finding]:
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name):
            yield Finding("error", "env", f"{name!r} is no name for a variable", "use letters, digits and _ alone")
        elif not isinstance(value, str):
            yield Finding("error", "env", f"the value of {name} is no string", f'write "{value}"')


def _options(metadata: Mapping[str, Any]) -> Iterator[Finding]:
    options = metadata.get("hub_gateway")
    if not isinstance(options, Mapping):
        return  # that it is no object, if it is there, is said of the kernelspec
    for name in sorted(set(options) - set(GATEWAY_OPTIONS)):
        yield Finding(
            "warning", f"hub_gateway.{name}", "the gateway knows no such option", f"known: {', '.join(GATEWAY_OPTIONS)}"
        )
    idle = options.get("cull_idle_timeout")
    if idle is not None and (isinstance(idle, bool) or not isinstance(idle, int | float) or idle < 0):
        yield Finding(
            "error", "hub_gateway.cull_idle_timeout", "it is no number of seconds", "write 3600, or 0 for never"
        )


def _config(spec: Spec, name: str, proxy: ProcessProxy) -> Iterator[Finding]:
    """The `config` for a process proxy: keys, types, and what the gateway's own configuration says of it."""
    known = None if proxy.config_keys is None else {**COMMON, **proxy.config_keys}
    wrong = False
    for key, value in spec.proxy_config.items():
        what = f"process_proxy.config.{key}"
        if known is None:
            continue
        if key in known:
            if why := known[key](value):
                wrong = True
                yield Finding("error", what, f"it {why}", f"this is {type(value).__name__} {str(value)[:60]!r}")
        elif key in ENTERPRISE_GATEWAY:
            yield Finding("warning", what, f"{name} does not heed it", "remove it")
        else:
            yield Finding(
                "error", what, f"{name} knows no such key", f"known: {', '.join(sorted(known))}; correct its name"
            )
    if wrong:
        return
    try:
        for finding in proxy.check_config(spec.proxy_config):
            yield replace(finding, what=f"process_proxy.config.{finding.what}")
    except TraitError as error:
        yield Finding("error", "process_proxy", str(error), "correct the gateway's configuration")


def _argv(argv: list[str], directory: Path, *, local: bool) -> Iterator[Finding]:
    text = " ".join(argv)
    used = _PLACEHOLDER.findall(text)
    if theirs := [name for name in used if name in LAUNCH_PROTOCOL]:
        yield Finding(
            "error",
            "argv",
            f"{{{theirs[0]}}} is for Enterprise Gateway's own launchers, which this gateway does not use",
            'start the kernel itself: ["python3", "{launchers_dir}/ipykernel_launcher.py", "-f", "{connection_file}"]',
        )
    elif "connection_file" not in used:
        yield Finding(
            "error", "argv", "it does not say where {connection_file} goes", "the kernel would not know where to listen"
        )
    for name in sorted({*used} - {*PLACEHOLDERS, *LAUNCH_PROTOCOL}):
        yield Finding("warning", "argv", f"nothing fills in {{{name}}}", f"known: {', '.join(PLACEHOLDERS)}")
    places = {"{launchers_dir}": launchers_dir(), "{resource_dir}": directory}
    for word in argv:
        for placeholder, place in places.items():
            if word.startswith(f"{placeholder}/") and not Path(word.replace(placeholder, str(place), 1)).is_file():
                yield Finding("error", "argv", f"there is no file {word}", f"{placeholder} is {place}")
    if "resource_dir" in used and not local:
        yield Finding(
            "warning",
            "argv",
            "{resource_dir} is a folder of the gateway's machine, and its kernels run elsewhere",
            "have the file there, and name its place there",
        )
    program = argv[0]
    if local and not program.startswith("{") and program not in ("python", "python3") and shutil.which(program) is None:
        yield Finding("warning", "argv", f"{program!r} is not on this machine", "install it, or name its place")
