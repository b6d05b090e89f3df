"""Every `jupyter hubgateway ...` that a reader is shown is a command: the application's own parser takes it."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from traitlets.config import Configurable

import hub_gateway
from hub_gateway.app import HubGateway
from hub_gateway.cli.base import Group
from hub_gateway.cli.client import Client
from hub_gateway.cli.strict import StrictApp
from hub_gateway.cli.token import Token
from tests.harness.gateway import ROOT

BLOCK = re.compile(r"^( *)```(?:console|bash|sh|shell|ini|text)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:^|[\s=/])jupyter[ -]hubgateway(?=\s|$)(.*)")
SPAN = re.compile(r"`jupyter[ -]hubgateway(\s[^`{]*)?`")
EXAMPLE = re.compile(r"^ {4}jupyter hubgateway\b(.*)", re.MULTILINE)
LEFT_OUT = ("_build", "node_modules")


@dataclass(frozen=True)
class Shown:
    """A command, and where it stands."""

    where: str
    argv: tuple[str, ...]
    whole: bool
    """Whether a reader would type it as it is; else it is in a sentence, and may name a group of commands."""


def test_enough_of_them_are_found() -> None:
    """So that a change of the pages' manner does not leave this file with nothing to look at."""
    whole = [one for one in COMMANDS if one.whole]
    assert len(whole) > 30
    assert {Path(one.where).parts[0] for one in COMMANDS} >= {"README.md", "docs", "hub_gateway", "jupyterhub_config"}
    assert {one.argv[0] for one in whole if one.argv} >= {"check", "db", "kernels", "maintenance", "quota", "usage"}


def shown() -> Iterator[Shown]:
    """All of them: of the pages, of the shipped configuration, and of the sources that pages are generated from."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "jupyterhub_config").iterdir()]
    for path in sorted(pages):
        if path.is_file() and not set(LEFT_OUT) & set(path.parts):
            text = path.read_text()
            yield from of_blocks(path, text)
            yield from of_sentences(path, text)
    for path in sorted((ROOT / "hub_gateway").rglob("*.py")):
        text = path.read_text()
        yield from of_sentences(path, text)
        yield from (Shown(name(path), words(found), True) for found in EXAMPLE.findall(text))


def of_blocks(path: Path, text: str) -> Iterator[Shown]:
    for _, block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            # A line of output may name a command as well; it is as true.
            found = COMMAND.search(line)
            if found is not None:
                yield Shown(name(path), words(found[1]), True)


def of_sentences(path: Path, text: str) -> Iterator[Shown]:
    # In a source, a comment's next line begins with its sign.
    for found in SPAN.findall(re.sub(r"\n\s*#?\s*", " ", text)):
        yield Shown(name(path), words(found), False)


def words(line: str) -> tuple[str, ...]:
    """Its arguments, up to a redirection or a comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";<>|&")
    lexer.whitespace_split = True
    found: list[str] = []
    for word in lexer:
        if set(word) <= set(";<>|&"):
            break
        found.append(word)
    return tuple(found)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


COMMANDS = sorted(set(shown()), key=lambda one: (one.where, one.argv))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: f"{one.where}: {' '.join(one.argv)}")
def test_a_command_that_is_shown(command: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for directory in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(directory, str(tmp_path))
    if "--help" in command.argv or "--help-all" in command.argv or "--generate-config" in command.argv:
        return
    app = parsed(command.argv)
    assert not unknown(app.cli_config), "no class, or none with these options"
    if command.whole:
        assert not isinstance(app, Group), f"which of {', '.join(app.subcommands)}?"
        run(app, monkeypatch)


@pytest.mark.parametrize(
    "argv",
    [
        ["chekc"],
        ["kernels", "lits"],
        ["--prot=8899"],
        ["check", "--confg=file"],
        ["quota", "set", "one", "--hrad", "5"],
        ["quota", "apply", "limits.yaml", "--dry-rnu"],
        ["quota", "limits", "bob"],
        ["usage", "report", "--format", "html"],
        ["--config=file.py", "check"],
        ["demo", "--chek"],
        ["demo", "now"],
    ],
    ids=" ".join,
)
def test_what_is_no_command_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A limit with a misspelt number must not be set, nor a gateway be started in place of a command."""
    with pytest.raises(SystemExit) as ended:
        parsed(argv)
    assert ended.value.code not in (0, None)


def test_options_of_classes_are_looked_up() -> None:
    assert not unknown(parsed(["check", "--HubGateway.port=1", "--Culler.cull_interval=60"]).cli_config)
    assert unknown(parsed(["check", "--Culler.cull_intreval=60", "--Cullre.cull_interval=60"]).cli_config) == [
        "Culler.cull_intreval",
        "Cullre.cull_interval",
    ]


def test_the_refusal_names_what_was_not_understood(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, said in {
        ("quota", "set", "one", "--hrad=5"): "jupyter-hubgateway-quota-set: there is no option --hrad",
        ("kernels", "list", "all"): "jupyter-hubgateway-kernels-list: there is no argument 'all' here",
        ("chekc",): "jupyter-hubgateway: there is no command 'chekc' here",
        ("--port=8899", "check"): "jupyter-hubgateway: check must come before options",
    }.items():
        with pytest.raises(SystemExit) as ended:
            parsed(argv)
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(said)


def parsed(argv: Any) -> StrictApp:
    """The application that these arguments make, as far as it can be without a gateway."""
    top: Any = HubGateway()
    app = top
    try:
        top.parse_command_line(list(argv))
    finally:
        while app.subapp is not None:
            app = app.subapp
        type(app).clear_instance()  # traitlets keeps the last one for all of the process
    assert isinstance(app, StrictApp)
    return app


class _Asked(Exception):
    """A command came as far as its first request to the gateway."""


def run(app: StrictApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a command has all that it needs; it shows only when it runs."""

    def ask(*args: Any, **more: Any) -> bytes:
        raise _Asked

    monkeypatch.setattr(Client, "fetch", ask)
    Path("limits.yaml").write_text("policies: []\n")
    if isinstance(app, Client):
        with pytest.raises(_Asked):
            app.run()
    elif isinstance(app, Token):
        assert app.run() == 0


def unknown(config: Mapping[str, Any]) -> list[str]:
    """Options of the form --Class.option that no class has."""
    known = {cls.__name__: cls.class_trait_names(config=True) for cls in classes()}
    given = [(section, option) for section, options in config.items() for option in options]
    return [f"{section}.{option}" for section, option in given if option not in known.get(section, ())]


def classes() -> set[type[Configurable]]:
    """All that can be configured, once every module is there."""
    for module in pkgutil.walk_packages(hub_gateway.__path__, "hub_gateway."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found: set[type[Configurable]] = set()
    more: list[type[Configurable]] = [Configurable]
    while more:
        more = [below for cls in more for below in cls.__subclasses__() if below not in found]
        found.update(more)
    return found
