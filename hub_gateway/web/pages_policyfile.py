"""All policies as a file: to be read, compared with another one, and made to be that one."""

from __future__ import annotations

import hashlib
from difflib import unified_diff
from typing import Any

from tornado.web import authenticated

from hub_gateway.auth.scopes import QUOTAS_READ, QUOTAS_WRITE, powers
from hub_gateway.errors import BadRequest, Conflict, Forbidden, GatewayError, NotFound
from hub_gateway.quotas.document import document, policies_of
from hub_gateway.web.console import ConsoleHandler

__all__ = ["PolicyFileHandler"]

MAX_DOCUMENT = 1_000_000


class PolicyFileHandler(ConsoleHandler):
    """The policies of everybody, so only for who may see (and change) all of them."""

    @authenticated
    async def get(self) -> None:
        if not powers(self.caller, QUOTAS_READ).everything:
            raise NotFound("There is nothing at this address of the gateway.")
        text = await self.quotas.export()
        if self.get_query_argument("download", ""):
            self.set_header("Content-Type", "application/yaml; charset=UTF-8")
            self.set_header("Content-Disposition", 'attachment; filename="policies.yaml"')
            self.finish(text)
            return
        self._file(text)

    async def post(self) -> None:
        self.check_form()
        await self.privileged()
        if not powers(self.caller, QUOTAS_WRITE).everything:
            raise Forbidden(
                f"A file is about the policies of everybody, and you do not have the permission {QUOTAS_WRITE} over "
                "all; ask the administrator of the gateway."
            )
        text = self.get_body_argument("text", "", strip=False).replace("\r\n", "\n")
        keep = self.field("keep") == "on"
        try:
            if len(text) > MAX_DOCUMENT:
                raise BadRequest(f"A file of policies has at most {MAX_DOCUMENT} characters; this one has more.")
            if self.field("do") != "apply":
                await self._compare(text, keep)
                return
            if self.field("seen") != _digest(await self.quotas.export(), text, keep):
                raise Conflict(
                    "The file, or the policies that hold, changed since they were compared; compare them again before "
                    "you apply the file."
                )
            found = await self.quotas.apply(text, self.caller.name, keep=keep)
        except (BadRequest, Conflict) as error:
            # What was typed stays, beside the reason.
            self.set_status(error.status)
            self._file(text, keep=keep, error=error)
            return
        self.done("admin/policies", f"The file is applied: {_counted(found)}.")

    async def _compare(self, text: str, keep: bool) -> None:
        now = await self.quotas.export()
        found = await self.quotas.apply(text, self.caller.name, dry_run=True, keep=keep)
        wanted = policies_of(text)
        if keep:
            named = {policy.name for policy in wanted}
            wanted += [policy for policy in policies_of(now) if policy.name not in named]
        lines = list(unified_diff(now.splitlines(), document(wanted).splitlines(), "now", "then", lineterm="", n=2))
        self._file(text, keep=keep, found=found, lines=lines, counted=_counted(found), seen=_digest(now, text, keep))

    def _file(self, text: str, *, keep: bool = False, error: GatewayError | None = None, **more: Any) -> None:
        usual: dict[str, Any] = {"found": None, "lines": [], "counted": "", "seen": ""}
        self.page(
            "admin_policy_file.html",
            "Policies as a file",
            "admin/policies",
            text=text,
            keep=keep,
            sentence="" if error is None else error.message,
            writes=powers(self.caller, QUOTAS_WRITE).everything,
            **{**usual, **more},
        )


def _digest(now: str, text: str, keep: bool) -> str:
    """What was compared with what."""
    return hashlib.sha256(f"{now}\0{text.strip()}\0{keep}".encode()).hexdigest()


def _counted(found: Any) -> str:
    return f"{len(found.added)} added, {len(found.changed)} changed, {len(found.removed)} deleted"
