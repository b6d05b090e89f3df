"""What the subcommands share: the gateway's own configuration, and how they say that they failed."""

from __future__ import annotations

import sys
from typing import NoReturn

from jupyter_core.application import JupyterApp
from traitlets import TraitError, default

from hub_gateway import __version__
from hub_gateway.app import ALIASES, HubGateway
from hub_gateway.cli.strict import StrictApp
from hub_gateway.errors import GatewayError

__all__ = ["Command", "Group"]


class Command(StrictApp):
    """A subcommand that reads the same configuration file and options as the gateway.

    `run` does the work and returns the exit code; a `GatewayError` from it is said in one line.
    """

    version = __version__
    aliases = {**JupyterApp.aliases, **ALIASES}
    classes = [HubGateway]

    @default("config_file_name")
    def _default_config_file_name(self) -> str:
        return "jupyter_hubgateway_config"

    def gateway(self) -> HubGateway:
        """The gateway that this configuration describes, not started. Raises `SystemExit` where it is wrong."""
        # JupyterApp reads configuration files into `self.config`; the gateway must not read them again.
        made = HubGateway(config=self.config, log=self.log)
        try:
            for trait in ("base_url", "state_dir", "db_url", "port", "ip"):
                getattr(made, trait)
        except TraitError as error:
            self.fail(str(error))
        return made

    def start(self) -> None:
        """Run, and end the process with the command's exit code."""
        super().start()
        try:
            status = self.run()
        except GatewayError as error:
            self.fail(error.message, error.hint)
        except BrokenPipeError:
            # `... | head` closed the pipe. What is left in the buffer must not be tried again at exit.
            sys.stdout = None
            status = 1
        sys.exit(status)

    def run(self) -> int:
        """Do it; the exit code."""
        raise NotImplementedError

    def fail(self, message: str, hint: str = "") -> NoReturn:
        """End with one line on standard error."""
        print(f"{self.name}: {message}{f' ({hint})' if hint else ''}", file=sys.stderr)
        sys.exit(1)

    def argument(self, what: str) -> str:
        """The one positional argument, or the end with a line that says what is missing."""
        if len(self.extra_args) != 1:
            self.fail(f"one argument is needed: {what}", f"{self.name} --help")
        return str(self.extra_args[0])


class Group(StrictApp):
    """A subcommand that has subcommands."""

    version = __version__
    aliases = {}

    @default("config_file_name")
    def _default_config_file_name(self) -> str:
        return "jupyter_hubgateway_config"

    def start(self) -> None:
        """Run the subcommand, or say which there are."""
        super().start()
        print(f"{self.name}: which one? {', '.join(self.subcommands)}", file=sys.stderr)
        sys.exit(2)
