"""What all handlers share: who is calling, what is answered when something goes wrong, what is logged."""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Awaitable, Mapping
from http import HTTPStatus
from typing import Any

from tornado.web import HTTPError, RequestHandler

from hub_gateway.auth.base import Caller
from hub_gateway.errors import BadRequest, GatewayError, PayloadTooLarge, Unauthenticated
from hub_gateway.metrics import METRICS
from hub_gateway.services import Services

__all__ = ["APIHandler", "BaseHandler", "NotFoundHandler", "json_body", "log_request"]

LOG = logging.getLogger("hub_gateway.web")
_TOKEN = re.compile(r"(?:token|bearer)\s+(\S+)\s*$", re.IGNORECASE)
_SECRET_ARGUMENT = re.compile(r"((?:^|[?&])(?:token|code|state)=)[^&]*", re.IGNORECASE)
_KNOWN = {error.status: error for error in GatewayError.__subclasses__()}


class BaseHandler(RequestHandler):
    """One request. `services` is the running gateway."""

    services: Services
    request_id: str

    def initialize(self, services: Services) -> None:
        self.services = services
        self.request_id = secrets.token_hex(8)

    def set_default_headers(self) -> None:
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
        self.set_header("Cache-Control", "no-store")
        self.clear_header("Server")

    @property
    def safe_path(self) -> str:
        """The path and query without what may be secret."""
        return _SECRET_ARGUMENT.sub(r"\1[secret]", self.request.uri or "")

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Expected errors on one line, defects with their traceback."""
        extra = {"request_id": self.request_id, "method": self.request.method, "path": self.safe_path}
        if isinstance(value, GatewayError):
            level = logging.WARNING if value.status >= 500 else logging.INFO
            hint = f" ({value.hint})" if value.hint else ""
            LOG.log(level, "%s%s", value.message, hint, extra={**extra, "status": value.status})
        elif isinstance(value, HTTPError):
            LOG.info("%s", value, extra={**extra, "status": value.status_code})
        else:
            LOG.error("Unexpected error", exc_info=(typ, value, tb), extra=extra)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Every error is JSON: `{"reason", "message", "code"}`."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        if isinstance(error, GatewayError):
            self.set_status(error.status)
            if error.retry_after is not None:
                self.set_header("Retry-After", str(int(error.retry_after)))
            if error.status == 401:
                self.set_header("WWW-Authenticate", "token")
            self.finish({**error.as_json(), "request_id": self.request_id})
            return
        known = _KNOWN.get(status_code)
        reason = HTTPStatus(status_code).phrase if status_code in HTTPStatus._value2member_map_ else "Error"
        if isinstance(error, HTTPError):
            message = error.log_message % error.args if error.log_message and error.args else error.log_message
            message = message or f"{self.request.method} is not possible here: {reason}."
        else:
            message = (
                "Something unexpected went wrong in the gateway; nothing is lost. "
                f"Try again, and tell the administrator this number if it persists: {self.request_id}."
            )
        code = known.code if known else reason.lower().replace(" ", "_")
        self.finish({"reason": reason, "message": message, "code": code, "request_id": self.request_id})


class APIHandler(BaseHandler):
    """A handler of the REST API: callers are known by the token in their Authorization header, and by nothing else.

    Cookies are not looked at, so that no page in a browser can act for its visitor.
    """

    caller: Caller

    def prepare(self) -> Awaitable[None] | None:
        return self._authenticate()

    async def _authenticate(self) -> None:
        self.caller = await self.identify()

    async def identify(self, *, fresh: bool = False) -> Caller:
        """The caller. Raises `Unauthenticated`, and what the authenticator raises."""
        header = self.request.headers.get("Authorization", "")
        found = _TOKEN.match(header)
        if found is None:
            raise Unauthenticated(
                "The request carries no token; send the header `Authorization: token ...` with a token of the Hub."
            )
        caller = await self.services.authenticator.authenticate(
            found.group(1), remote_ip=self.request.remote_ip or "", fresh=fresh
        )
        if caller is None:
            raise Unauthenticated(
                "The token is not valid or has expired; restart your server to get a new one, or log in again."
            )
        return caller

    async def options(self, *args: str) -> None:
        """What may be done here. Nothing is allowed to other origins."""
        self.set_header("Allow", ", ".join(self.SUPPORTED_METHODS))
        self.set_status(204)
        await self.finish()

    def write_json(self, value: Any, status: int = 200) -> None:
        """Answer with JSON."""
        self.set_status(status)
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.write(json.dumps(value))


class NotFoundHandler(BaseHandler):
    """Any other path."""

    def prepare(self) -> None:
        raise HTTPError(404, "There is nothing at this address of the gateway.")


def json_body(handler: BaseHandler) -> dict[str, Any]:
    """The request's body, which must be a JSON object; {} where there is none."""
    body = handler.request.body
    if len(body) > handler.services.web.max_body_bytes:
        raise PayloadTooLarge(f"The request's body exceeds {handler.services.web.max_body_bytes} bytes.")
    if not body.strip():
        return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The request's body is not JSON ({error}); send a JSON object.") from error
    if not isinstance(value, dict):
        raise BadRequest("The request's body must be a JSON object.")
    return value


def string_field(body: Mapping[str, Any], name: str) -> str | None:
    """An optional string of a body. Raises `BadRequest`."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"The field `{name}` must be a string.")
    return value


def log_request(handler: RequestHandler) -> None:
    """tornado's access log: one line a request, no query secrets; successful polls only at debug level."""
    status, seconds = handler.get_status(), handler.request.request_time()
    METRICS.requests.labels(handler.request.method, str(status)).observe(seconds)
    quiet = status < 400 and handler.request.method in ("GET", "HEAD", "OPTIONS")
    level = logging.DEBUG if quiet else logging.INFO
    if LOG.isEnabledFor(level):
        caller = getattr(handler, "caller", None)
        LOG.log(
            level,
            "request",
            extra={
                "status": status,
                "method": handler.request.method,
                "path": getattr(handler, "safe_path", handler.request.path),
                "duration_ms": round(seconds * 1000, 1),
                "remote_ip": handler.request.remote_ip,
                "user": caller.name if caller is not None else None,
                "request_id": getattr(handler, "request_id", None),
            },
        )
