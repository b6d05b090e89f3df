"""A command line that is refused where it would otherwise be misread."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, NoReturn

from jupyter_core.application import JupyterApp
from traitlets.config.loader import KVArgParseConfigLoader

__all__ = ["StrictApp"]


class StrictApp(JupyterApp):
    """An application that knows each of its options and arguments, and ends with exit code 2 at any other.

    traitlets by itself only warns of an option that it does not know, and keeps stray words to itself:
    `quota set alice --hrad=5` would set a limit of nothing, and `chekc` in place of `check` start a gateway. Options
    that name a class (`--Class.option=value`) are as traitlets treats them: a class may come with an extension.
    """

    takes_arguments: ClassVar[bool] = False

    def parse_command_line(self, argv: Any = None) -> None:
        super().parse_command_line(argv)
        stray = [] if self.takes_arguments or self.subapp is not None else self.extra_args
        if stray and stray[0] in (self.subcommands or ()):
            self.misread(f"{stray[0]} must come before options")
        elif stray:
            self.misread(f"there is no {'command' if self.subcommands else 'argument'} {stray[0]!r} here")

    def misread(self, why: str) -> NoReturn:
        """End with one line on standard error."""
        print(f"{self.name}: {why} ({self.name} --help)", file=sys.stderr)
        sys.exit(2)

    def _create_loader(self, argv: Any, aliases: Any, flags: Any, classes: Any) -> KVArgParseConfigLoader:
        app = self

        class Loader(KVArgParseConfigLoader):
            def _handle_unrecognized_alias(self, arg: str) -> None:
                # traitlets calls this to be overridden in just this way.
                app.misread(f"there is no option --{arg}")

        return Loader(argv, aliases, flags, classes=classes, log=self.log, subcommands=self.subcommands)
