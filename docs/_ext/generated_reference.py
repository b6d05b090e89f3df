"""Writes the reference pages that the code itself knows best: options, command line, REST interface, metrics.

They are Markdown files in docs/reference/generated/ (not kept in the repository), written before Sphinx
looks for sources and only where their text has changed.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from sphinx.application import Sphinx
from traitlets import Undefined
from traitlets.config import Application, Configurable

import hub_gateway
from hub_gateway.auth.scopes import SERVICE_SCOPES, scope_table
from hub_gateway.cli import subcommands
from hub_gateway.metrics import Metrics

PACKAGE = Path(hub_gateway.__file__).parent
METHODS = ("get", "post", "put", "patch", "delete", "head", "options")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def generate(app: Sphinx) -> None:
    """Write all pages."""
    target = Path(app.srcdir) / "reference" / "generated"
    target.mkdir(exist_ok=True)
    pages = {
        "options.md": options(),
        "cli.md": command_line(),
        "rest.md": rest(),
        "scopes.md": scopes(),
        "metrics.md": metrics(),
    }
    for name, text in pages.items():
        path = target / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


# -- options


def options() -> str:
    """Every configurable class of the package, with its traits."""
    lines = [
        "# Options",
        "",
        "In `jupyter_hubgateway_config.py`, or the file that `--config` names, as `c.Class.option = value`; on the",
        "command line as `--Class.option=value`. `jupyter hubgateway --generate-config` writes a file with all.",
        "",
    ]
    for cls in sorted(configurables(), key=lambda cls: (cls.__name__ != "HubGateway", cls.__name__)):
        lines += [f"## {section_of(cls)}", "", paragraphs(inspect.getdoc(cls) or ""), ""]
        lines += described(cls)
    return "\n".join(lines) + "\n"


def configurables() -> Iterator[type[Configurable]]:
    """Classes with options of their own, except the subcommands'."""
    for module in pkgutil.walk_packages(hub_gateway.__path__, "hub_gateway."):
        if module.name.rpartition(".")[2] not in ("__main__", "env") and not module.name.startswith("hub_gateway._"):
            importlib.import_module(module.name)
    seen: set[type] = set()
    waiting: list[type[Configurable]] = [Configurable]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            if cls in seen:
                continue
            seen.add(cls)
            waiting.append(cls)
            ours = cls.__module__.startswith("hub_gateway.")
            command = cls.__module__.startswith(("hub_gateway.cli.", "hub_gateway.demo."))
            if ours and not command and cls.class_own_traits(config=True):
                yield cls


def section_of(cls: type[Configurable]) -> str:
    """The section of the configuration in which a class's own options are written."""
    return str(vars(cls).get("options_of", cls.__name__))


def described(cls: type[Configurable]) -> list[str]:
    """The options of one class, as a definition list."""
    lines = []
    for name, trait in sorted(cls.class_own_traits(config=True).items()):
        kind = type(trait).__name__
        default = computed_default(trait)
        lines += [f"`c.{section_of(cls)}.{name}` ({kind}, {default})", indented(paragraphs(str(trait.help or ""))), ""]
    return lines


def computed_default(trait: Any) -> str:
    """The default as it is told to a reader: a value, or that it is worked out at start."""
    value = trait.default() if trait.default_value is Undefined else trait.default_value
    if value in ("", None, Undefined):
        return "default: see below"
    shown = repr(value)
    # What depends on the machine on which the pages are made says nothing to their reader.
    return "default: see below" if "/" in shown and shown.startswith("'") else f"default `{shown}`"


# -- command line


def command_line() -> str:
    """Every command, with its description, examples and own options."""
    lines = [
        "# Command line",
        "",
        "`jupyter hubgateway` without a subcommand runs the gateway ([options](options.md)). Every command reads",
        "the same configuration file, and takes `--config=FILE`, `--state-dir=DIRECTORY`, `--db-url=URL` and `--help`.",
        "",
    ]
    for name, (path, summary) in subcommands.items():
        module, _, attribute = path.rpartition(".")
        lines += command(f"jupyter hubgateway {name}", getattr(importlib.import_module(module), attribute), summary, 2)
    return "\n".join(lines) + "\n"


def command(name: str, cls: type[Application], summary: str, level: int) -> Iterator[str]:
    """One command and the commands below it."""
    yield from (f"{'#' * level} {name}", "", paragraphs(inspect.getdoc(cls) or summary), "")
    # Both are traits of the base class; a command that has some overwrites them with plain values.
    examples = textwrap.dedent(cls.examples).strip() if isinstance(cls.examples, str) else ""
    below = cls.subcommands if isinstance(cls.subcommands, dict) else {}
    if examples:
        yield from ("```console", *(f"$ {line.strip()}" for line in examples.splitlines()), "```", "")
    own = cls.class_own_traits(config=True)
    aliases = {value.partition(".")[2]: key for key, value in cls.aliases.items() if isinstance(value, str)}
    flags = {
        trait: key
        for key, (config, _) in cls.flags.items()
        for section, values in config.items()
        if section in {base.__name__ for base in cls.__mro__}
        for trait in values
        if isinstance(key, str)
    }
    inherited = [base for base in cls.__mro__[1:] if base.__module__.startswith("hub_gateway.")]
    for base in inherited:
        own = {**base.class_own_traits(config=True), **own}
    for trait_name, trait in sorted(own.items()):
        word = f"--{flags[trait_name]}" if trait_name in flags else f"--{aliases.get(trait_name, trait_name)}=..."
        yield from (f"`{word}`", indented(paragraphs(str(trait.help or ""))), "")
    for sub, (subclass, text) in below.items():
        yield from command(f"{name} {sub}", subclass, text or "", level + 1)


# -- scopes


def scopes() -> str:
    """The scopes that administrators of a Hub may give."""
    lines = [
        "# Scopes",
        "",
        "Custom scopes of JupyterHub, defined in `jupyterhub_config/scopes.py` and given in `c.JupyterHub.load_roles`.",
        "A filter limits one to some: `custom:hub-gateway:quotas:write!group=analysts` is for the lead of a group.",
        "Powers come from the scopes of the presented token alone, and are looked up anew before anything is changed.",
        "",
    ]
    role = ", ".join(f"`{scope}`" for scope in SERVICE_SCOPES)
    return "\n".join([*lines, scope_table(), f"The gateway's own role at the Hub holds {role}.", ""])


# -- metrics


def metrics() -> str:
    """Every metric, with the values that its labels take."""
    lines = [
        "# Metrics",
        "",
        "At `GET {base_url}/metrics`, in the text format of Prometheus, without a token: no label carries the name of",
        "a user or a kernel. Every label value is there from the start, at zero. `deploy/grafana/` has dashboards.",
        "",
    ]
    for found in sorted(Metrics().registry.collect(), key=lambda metric: metric.name):
        suffix = "_total" if found.type == "counter" else ""
        labels: dict[str, list[str]] = {}
        for sample in found.samples:
            for label, value in sample.labels.items():
                if label != "le" and value not in labels.setdefault(label, []):
                    labels[label].append(value)
        lines += [f"`{found.name}{suffix}` ({found.type})", indented(one_line(found.documentation)), ""]
        for label, values in labels.items():
            lines += [f"  `{label}`: {', '.join(f'`{value}`' for value in values)}", ""]
    return "\n".join(lines) + "\n"


# -- REST


def rest() -> str:
    """The OpenAPI file as a page."""
    path = PACKAGE / "web" / "openapi.yaml"
    spec = yaml.safe_load(path.read_text())
    info = spec["info"]
    lines = [f"# {info.get('title', 'REST interface')}", "", paragraphs(info.get("description", "")), ""]
    lines += ["The same as an OpenAPI file: `GET {base_url}/api/swagger.yaml`.", ""]
    for address, operations in spec["paths"].items():
        lines += [f"## `{address}`", ""]
        for method in METHODS:
            if method in operations:
                shared = operations.get("parameters", [])
                lines += operation(spec, method, operations[method], shared)
    schemas = spec.get("components", {}).get("schemas", {})
    if schemas:
        lines += ["## Bodies", ""]
    for name, schema in schemas.items():
        lines += [f"### {name}", "", paragraphs(schema.get("description", "")), "", *fields(spec, schema), ""]
    return "\n".join(lines) + "\n"


def operation(spec: Any, method: str, found: Any, shared: list[Any]) -> Iterator[str]:
    """One method of one address."""
    yield from (f"**{method.upper()}** {one_line(found.get('summary', ''))}", "")
    if found.get("description"):
        yield from (paragraphs(found["description"]), "")
    parameters = [resolve(spec, parameter) for parameter in (*shared, *found.get("parameters", []))]
    for parameter in parameters:
        yield f"- `{parameter['name']}` ({parameter['in']}): {one_line(parameter.get('description', ''))}"
    body = resolve(spec, found.get("requestBody", {})).get("content", {})
    for media, content in body.items():
        yield f"- body, {media}: {name_of(content.get('schema', {}))}"
    yield ""
    for status, answer in found.get("responses", {}).items():
        answer = resolve(spec, answer)
        schemas = [name_of(c.get("schema", {})) for c in answer.get("content", {}).values()]
        named = f" ({', '.join(schemas)})" if any(schemas) else ""
        yield f"- `{status}` {one_line(answer.get('description', ''))}{named}"
    yield ""


def fields(spec: Any, schema: Any) -> Iterator[str]:
    """The properties of an object."""
    required = set(schema.get("required", []))
    for name, found in schema.get("properties", {}).items():
        kind = name_of(found) or str(resolve(spec, found).get("type", ""))
        text = one_line(resolve(spec, found).get("description", ""))
        yield f"- `{name}` ({kind}{', required' if name in required else ''}){f': {text}' if text else ''}"


def resolve(spec: Any, found: Any) -> Any:
    """Follow a `$ref`."""
    while "$ref" in found:
        at = spec
        for part in found["$ref"].removeprefix("#/").split("/"):
            at = at[part]
        found = at
    return found


def name_of(schema: Any) -> str:
    """How a schema is called in the text."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if schema.get("type") == "array":
        return f"list of {name_of(schema.get('items', {})) or 'values'}"
    return str(schema.get("type", "") or "")


# -- text


def paragraphs(text: str) -> str:
    """A docstring or help text as Markdown: paragraphs, with what is indented as code."""
    return re.sub(r"``([^`]+)``", r"`\1`", textwrap.dedent(inspect.cleandoc(text)))


def one_line(text: str) -> str:
    return " ".join(text.split())


def indented(text: str) -> str:
    """The definition of a definition list."""
    first, *rest = (text or "(no description)").splitlines()
    return "\n".join([f": {first}", *(f"  {line}" if line.strip() else "" for line in rest)])
