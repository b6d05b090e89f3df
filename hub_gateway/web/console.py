"""What pages of the console share: who looks, the way around, forms that cannot be forged, and a word after each."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tornado.web import HTTPError

from hub_gateway.auth.base import Caller
from hub_gateway.auth.hub import caller_of
from hub_gateway.auth.scopes import (
    AUDIT_READ,
    IDENTITY_READ,
    KERNELS_READ,
    LEDGER_WRITE,
    MAINTENANCE_WRITE,
    QUOTAS_READ,
    USAGE_READ,
    powers,
)
from hub_gateway.db.models import utcnow
from hub_gateway.errors import Forbidden, GatewayError, NotFound, Unauthenticated
from hub_gateway.kernels.service import owner_of
from hub_gateway.quotas.amounts import shown
from hub_gateway.web.authority import Authority
from hub_gateway.web.forms import FIELD, once, signed_number
from hub_gateway.web.pages import PageHandler

if TYPE_CHECKING:
    from hub_gateway.quotas.reports import Report
    from hub_gateway.quotas.requests import Request
    from hub_gateway.web.parts import AuditPart, QuotaPart, ReportsPart

__all__ = ["ConsoleHandler"]

FLASH = "hub-gateway-said"
MAX_FIELD = 4000
REFRESH_SECONDS = 5
"""How often a page asks for its live part."""
ADMIN: tuple[tuple[str, str, str], ...] = (
    ("admin/kernels", "Kernels", KERNELS_READ),
    ("admin/people", "People", QUOTAS_READ),
    ("admin/policies", "Policies", QUOTAS_READ),
    ("admin/requests", "Requests", QUOTAS_READ),
    ("admin/queue", "Queue", QUOTAS_READ),
    ("admin/usage", "Usage", USAGE_READ),
    ("admin/ledger", "Ledger", LEDGER_WRITE),
    ("admin/identity", "Identity", IDENTITY_READ),
    ("admin/clusters", "Clusters", KERNELS_READ),
    ("admin/audit", "Audit", AUDIT_READ),
    ("admin/maintenance", "Maintenance", MAINTENANCE_WRITE),
)
"""Address, title, and the scope without which a page is not for somebody."""


class ConsoleHandler(PageHandler):
    """A page for a person. Whatever it changes it changes by a POST, and answers with a redirect."""

    _held_back: list[Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "post" in cls.__dict__:
            cls.post = once(cls.post)

    def xsrf_form_html(self) -> str:
        """What every form holds, so that nobody else can have made it, and it is carried out once."""
        html: str = super().xsrf_form_html()
        return f'{html}<input type="hidden" name="{FIELD}" value="{signed_number(self)}">'

    @property
    def refreshes(self) -> bool:
        """Whether a page that is open already asks for its live part alone."""
        return self.request.headers.get("HX-Request") == "true"

    async def prepare(self) -> None:
        await super().prepare()
        if self.refreshes and self.current_user is None:
            # The login page has no place in the middle of another.
            raise Unauthenticated("Your login has ended; open the page again to log in.")

    @property
    def caller(self) -> Caller:
        """Who looks, as known at most some seconds ago."""
        return caller_of(self.current_user)

    @property
    def owner(self) -> str:
        """Who owns what the visitor starts."""
        return owner_of(self.caller)

    def authority(self) -> Authority:
        """The rules for who looks."""
        return Authority(self.services, self.caller)

    async def privileged(self) -> Authority:
        """The rules for who changes something, whose login is looked up anew at the Hub.

        Raises `Unauthenticated` for one that was revoked meanwhile, `Forbidden` for one that no longer opens the
        gateway, `Unavailable`.
        """
        assert self.services.hub is not None
        authenticator = self.services.hub.authenticator
        token = self.hub_auth.get_token(self) or ""
        session = self.hub_auth.get_session_id(self) or ""  # type: ignore[no-untyped-call]
        model = await authenticator.model_of(token, session, fresh=True)
        if model is None:
            raise Unauthenticated("Your login has ended; open the page again to log in.")
        authenticator.check_access(model)
        self.current_user = dict(model)
        return Authority(self.services, self.caller, fresh=True)

    def check_form(self) -> None:
        """Whether a form comes from a page of ours, filled in by who is logged in. Raises `Forbidden`.

        HubOAuth knows nobody by a cookie in a POST whose XSRF token is missing or somebody else's.
        """
        if self.current_user is None:
            raise Forbidden(
                "This form was not sent from a page of the gateway, or has grown old, and nothing was changed; open "
                "the page again and repeat it."
            )

    def field(self, name: str, default: str = "") -> str:
        """A field of the form, "" where it is missing."""
        return self.get_body_argument(name, default)[:MAX_FIELD].strip()

    @property
    def quotas(self) -> QuotaPart:
        """Policies and limits."""
        assert self.services.quotas is not None
        return self.services.quotas

    @property
    def reports(self) -> ReportsPart:
        """The ledger's reports."""
        assert self.services.reports is not None
        return self.services.reports

    @property
    def audit(self) -> AuditPart:
        """The audit trail."""
        assert self.services.audit is not None
        return self.services.audit

    def address(self, path: str) -> str:
        """The address of a page."""
        return f"{self.hub_auth.base_url}{path}"

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """The answer is sent at the end, and not at all where there is an error, which has an answer of its own."""
        self._held_back = []
        try:
            yield
            answers, self._held_back = self._held_back, None
        finally:
            self._held_back = None
        for chunk in answers:
            self.finish(chunk)

    def finish(self, chunk: str | bytes | dict[str, Any] | None = None) -> asyncio.Future[None]:
        """Send the answer, unless it is `held_back`."""
        if self._held_back is None:
            return super().finish(chunk)
        self._held_back.append(chunk)
        kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        kept.set_result(None)
        return kept

    def require(self, scope: str) -> None:
        """Whether the page is for who looks; to anybody else it does not exist."""
        if not powers(self.caller, scope):
            raise NotFound("There is nothing at this address of the gateway.")

    def done(self, path: str, sentence: str, *, good: bool = True) -> None:
        """Go to a page, which says what has happened."""
        said = json.dumps([sentence, good])
        self.set_secure_cookie(
            FLASH, said, expires_days=None, httponly=True, samesite="Lax", path=self.hub_auth.base_url
        )
        self.redirect(self.address(path), status=303)  # type: ignore[no-untyped-call]

    def _said(self) -> tuple[str, bool] | None:
        found = self.get_secure_cookie(FLASH, max_age_days=0.01)
        if found is None:
            return None
        self.clear_cookie(FLASH, path=self.hub_auth.base_url)
        sentence, good = json.loads(found)
        return str(sentence), bool(good)

    def page(self, template: str, title: str, path: str, *, live: str | None = None, **more: Any) -> None:
        """Answer with a page; with `live`, the template of the part that refreshes itself, where that is asked for."""
        caller = self.caller
        self.set_header("Vary", "HX-Request")
        if live is not None and self.refreshes:
            self.render(live, caller=caller, shown=shown, **more)
            return
        admin = [(address, name) for address, name, scope in ADMIN if powers(caller, scope)]
        self.render(
            template,
            title=title,
            path=path,
            caller=caller,
            said=self._said(),
            own_pages=(("home", "My kernels"), ("limits", "My limits"), ("history", "My usage")),
            admin_pages=admin,
            hub=self.hub_auth.hub_prefix,
            shown=shown,
            every=REFRESH_SECONDS,
            now=utcnow(),
            **more,
        )

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """A page with one sentence, with the way around where somebody is logged in."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        if self.refreshes:
            status, body = self.describe(status_code, error)
            self.set_status(status)
            self.set_error_headers(status, error)
            self.set_header("Content-Type", "text/plain; charset=UTF-8")
            self.finish(body["message"])
            return
        if self.current_user is None or not isinstance(error, GatewayError | HTTPError):
            super().write_error(status_code, **kwargs)
            return
        status, body = self.describe(status_code, error)
        self.set_status(status)
        self.set_error_headers(status, error)
        self.page("sorry.html", body["reason"], "", sentence=body["message"])

    async def asked(self, requests: Sequence[Request]) -> Callable[[Request], str]:
        """How much each of some requests is for, with the unit of its policy."""
        known = {policy.name: policy for policy in await self.quotas.policies()} if requests else {}

        def written(request: Request) -> str:
            policy = known.get(request.policy)
            return f"{request.amount:g}" if policy is None else shown(policy.resource, request.amount, policy.gpu_model)

        return written

    def csv(self, report: Report, name: str) -> None:
        """Answer with a report as a file for a spreadsheet."""
        last = report.end - timedelta(microseconds=1)
        self.set_header("Content-Type", "text/csv; charset=UTF-8")
        self.set_header(
            "Content-Disposition", f'attachment; filename="{name}-{report.start:%Y-%m-%d}-{last:%Y-%m-%d}.csv"'
        )
        self.finish(report.to_csv())

    def chosen(self, names: Mapping[str, str]) -> dict[str, str]:
        """Arguments of the address, each with its default."""
        return {name: self.get_query_argument(name, default)[:200].strip() for name, default in names.items()}
