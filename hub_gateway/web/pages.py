"""Pages for browsers, behind the Hub's OAuth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jupyterhub.services.auth import HubOAuthCallbackHandler, HubOAuthenticated, UserNotAllowed
from sqlalchemy.orm import Session as Transaction
from tornado.web import HTTPError

from hub_gateway.auth.oauth import GatewayOAuth, Model
from hub_gateway.errors import Forbidden, Unavailable
from hub_gateway.services import Services
from hub_gateway.web.base import BaseHandler, NotFoundHandler, wants_page
from hub_gateway.web.static import versioned

__all__ = ["TEMPLATES", "CallbackHandler", "MissingHandler", "PageHandler"]

TEMPLATES = Path(__file__).parent / "templates"
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'none'"
)
AGAIN = "hub-gateway-again"


class PageHandler(HubOAuthenticated, BaseHandler):
    """A page for somebody who has logged in at the Hub.

    jupyterhub looks users up synchronously when it is asked for `current_user`; `prepare` has found it before that.
    """

    hub_auth: GatewayOAuth

    def initialize(self, services: Services) -> None:
        super().initialize(services)
        assert services.hub is not None
        self.hub_auth = services.hub.oauth
        # Until `prepare` knows better, so that nothing, not even a page about an error, asks jupyterhub.
        self.current_user = None

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.set_header("Content-Security-Policy", POLICY)
        self.set_header("Referrer-Policy", "same-origin")

    async def prepare(self) -> None:
        self.current_user = await self.visitor()

    async def visitor(self) -> dict[str, Any] | None:
        """The Hub's description of who has the cookie. Raises `Forbidden`, `Unavailable`."""
        model = await self.hub_auth.get_user(self, sync=False)
        if model is None:
            return None
        try:
            allowed: dict[str, Any] = self.check_hub_user(dict(model))
        except UserNotAllowed:
            raise Forbidden(
                f"{model['name']} may not use this gateway; ask the Hub's administrator for access to the service."
            ) from None
        return allowed

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """A page with one sentence."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        status, body = self.describe(status_code, error)
        self.set_status(status)
        self.set_error_headers(status, error)
        self.render("error.html", sentence=body["message"], home=self.home, reason=body["reason"], again=True)

    @property
    def home(self) -> str:
        """The address of the home page."""
        return f"{self.hub_auth.base_url}home"

    def get_template_path(self) -> str:
        return str(TEMPLATES)

    def get_template_namespace(self) -> dict[str, Any]:
        return {**super().get_template_namespace(), **page_names(self.hub_auth.base_url)}


def page_names(base_url: str) -> dict[str, Any]:
    """What every template knows: the address below which pages are, and that of a static file."""
    return {"base": base_url, "static": lambda name: f"{base_url}static/{versioned(name)}"}


class MissingHandler(NotFoundHandler):
    """Any other address: a page for a browser, whoever it is, and JSON for a program."""

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.set_header("Vary", "Accept")
        if not wants_page(self.request):
            super().write_error(status_code, **kwargs)
            return
        assert self.services.hub is not None
        status, body = self.describe(status_code, kwargs.get("exc_info", (None, None, None))[1])
        base_url = self.services.hub.oauth.base_url
        self.set_status(status)
        self.set_header("Content-Security-Policy", POLICY)
        self.render(
            "error.html",
            sentence=body["message"],
            home=f"{base_url}home",
            reason=body["reason"],
            again=False,
            **page_names(base_url),
        )

    def get_template_path(self) -> str:
        return str(TEMPLATES)


class CallbackHandler(PageHandler, HubOAuthCallbackHandler):
    """Where the Hub sends a browser back after the login. A login that has gone stale is begun anew, once."""

    _then: str | None = None
    _token = ""

    async def get(self) -> None:
        state = self.get_argument("state", "")
        if self.get_argument("error", None) is None and not self.hub_auth.knows(state):
            if self.get_cookie(AGAIN):
                raise Forbidden("The login took too long or was begun elsewhere; open the page again to log in anew.")
            # A cookie that lives for a minute keeps a browser without cookies from going round in circles.
            self.set_cookie(AGAIN, "1", max_age=60, httponly=True, path=self.hub_auth.base_url)
            BaseHandler.redirect(self, self.home)
            return
        try:
            await HubOAuthCallbackHandler.get(self)
        except HTTPError as error:
            if error.status_code < 500:
                raise
            # jupyterhub's own sentence names internal addresses.
            raise Unavailable(
                "The JupyterHub could not complete the login; open the page again in a few seconds.", hint=str(error)
            ) from error
        if self._token:
            session = self.hub_auth.get_session_id(self)  # type: ignore[no-untyped-call]
            await self._record(await self.hub_auth.user_for_token(self._token, session_id=session, sync=False))
        assert self._then is not None
        BaseHandler.redirect(self, self._then)

    def set_secure_cookie(self, name: str, value: str | bytes, *args: Any, **kwargs: Any) -> None:
        """What jupyterhub gives the browser at the end of a login; only here the login's token is seen."""
        if name == self.hub_auth.cookie_name and isinstance(value, str):
            self._token = value
        self.set_signed_cookie(name, value, *args, **kwargs)

    def redirect(self, url: str, permanent: bool = False, status: int | None = None) -> None:
        """Once all is done that belongs to the login."""
        self._then = url

    async def _record(self, user: Model | None) -> None:
        """Write the login into the audit trail. Who cannot log in is not known here: the Hub's log has that."""
        audit = self.services.audit
        if audit is None or user is None:
            return
        name, detail = str(user["name"]), {"address": self.request.remote_ip}

        def record(tx: Transaction) -> None:
            audit.append(tx, actor=name, action="login", subject=name, outcome="ok", detail=detail)

        await self.services.db.write(record)
