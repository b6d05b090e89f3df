"""Pages for browsers, behind the Hub's OAuth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jupyterhub.services.auth import HubOAuthCallbackHandler, HubOAuthenticated, UserNotAllowed
from tornado.web import HTTPError, authenticated

from hub_gateway.auth.hub import GatewayOAuth, caller_of
from hub_gateway.errors import Forbidden, GatewayError, Unavailable
from hub_gateway.services import Services
from hub_gateway.web.base import BaseHandler

__all__ = ["CallbackHandler", "HomeHandler", "PageHandler", "TEMPLATES"]

TEMPLATES = Path(__file__).parent / "templates"
STYLE = (
    "default-src 'none'; style-src 'self' 'unsafe-inline'; img-src 'self'; frame-ancestors 'none'; form-action 'self'"
)


class PageHandler(HubOAuthenticated, BaseHandler):
    """A page for somebody who has logged in at the Hub.

    jupyterhub looks users up synchronously when it is asked for `current_user`; `prepare` has found it before that.
    """

    def initialize(self, services: Services) -> None:
        super().initialize(services)
        assert services.hub is not None
        self.hub_auth: GatewayOAuth = services.hub.oauth

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.set_header("Content-Security-Policy", STYLE)

    async def prepare(self) -> None:
        try:
            model = await self.hub_auth.get_user(self, sync=False)
        except HTTPError as error:
            raise Unavailable(
                "The JupyterHub cannot be reached at the moment; try again in a few seconds.", hint=str(error)
            ) from error
        if model is not None:
            try:
                model = self.check_hub_user(model)
            except UserNotAllowed:
                raise Forbidden(
                    f"{model['name']} may not use this gateway; ask the Hub's administrator for access to the service."
                ) from None
        self.current_user = model

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """A page with one sentence."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        if isinstance(error, GatewayError):
            status_code, sentence = error.status, error.message
        elif isinstance(error, HTTPError) and error.log_message:
            sentence = error.log_message % error.args if error.args else error.log_message
        else:
            sentence = f"Something unexpected went wrong; tell the administrator this number: {self.request_id}."
        self.set_status(status_code)
        self.render("error.html", sentence=sentence, home=self.hub_auth.base_url + "home", status=status_code)

    def get_template_path(self) -> str:
        return str(TEMPLATES)


class HomeHandler(PageHandler):
    """Who you are, and your kernels."""

    @authenticated
    async def get(self) -> None:
        caller = caller_of(self.current_user)
        kernels = await self.services.kernels.list(caller)
        self.render("home.html", caller=caller, kernels=kernels, hub=self.hub_auth.hub_prefix)


class CallbackHandler(HubOAuthCallbackHandler, BaseHandler):
    """Where the Hub sends a browser back after the login. A login that has gone stale is begun anew, once."""

    def initialize(self, services: Services) -> None:
        super().initialize(services)
        assert services.hub is not None
        self.hub_auth: GatewayOAuth = services.hub.oauth

    async def get(self) -> None:
        state = self.get_argument("state", "")
        if self.get_argument("error", None) is None and not self.hub_auth._decode_state(state):
            if self.get_cookie("hub-gateway-again"):
                raise Forbidden("The login took too long or was begun elsewhere; open the page again to log in anew.")
            # A cookie that lives for a minute keeps a browser without cookies from going round in circles.
            self.set_cookie("hub-gateway-again", "1", max_age=60, httponly=True, path=self.hub_auth.base_url)
            self.redirect(self.hub_auth.base_url + "home")
            return
        await super().get()
