"""What all handlers share: who is calling, what is answered when something goes wrong, what is logged."""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import textwrap
from collections.abc import Awaitable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, NoReturn
from urllib.parse import parse_qsl, urlencode

from tornado.httputil import HTTPServerRequest
from tornado.web import HTTPError, RequestHandler, stream_request_body

from hub_gateway.auth.base import Caller
from hub_gateway.errors import BadRequest, GatewayError, NotFound, PayloadTooLarge, Unauthenticated
from hub_gateway.metrics import METRICS
from hub_gateway.services import Services

__all__ = [
    "APIHandler",
    "BaseHandler",
    "NotFoundHandler",
    "TooLargeHandler",
    "json_body",
    "log_request",
    "of_notebook_server",
    "string_field",
    "token_of",
    "too_large",
    "wants_page",
]

LOG = logging.getLogger("hub_gateway.web")
DIALOG_COLUMNS = 100
MAX_STRING = 4096
DRAIN_BYTES = 32 * 2**20
"""How much of a body that is too large is read and thrown away, so that its sender gets to read the answer."""

_TOKEN = re.compile(r"(?:token|bearer)\s+(\S+)\s*$", re.IGNORECASE)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# What no database takes: NUL, and surrogates that are not a pair. JSON can have them by escapes only.
_SUSPECT = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")
_LOGGED_ARGUMENTS = frozenset(("user", "session_id", "last_seq"))
_METHODS = ("GET", "HEAD", "POST", "DELETE", "PATCH", "PUT")
_KNOWN: Mapping[int, type[GatewayError]] = {
    **{error.status: error for error in GatewayError.__subclasses__()},
    500: GatewayError,
}


class BaseHandler(RequestHandler):
    """One request. `services` is the running gateway."""

    services: Services
    request_id: str
    max_body_bytes: int | None = None
    """Limit of the body where it is lower than the configured one."""

    def initialize(self, services: Services) -> None:
        self.services = services
        self.request_id = secrets.token_hex(8)
        self.set_header("X-Request-Id", self.request_id)

    def set_default_headers(self) -> None:
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
        self.set_header("Cache-Control", "no-store")
        self.clear_header("Server")
        request_id = getattr(self, "request_id", None)
        if request_id is not None:  # tornado calls this again before it writes an error
            self.set_header("X-Request-Id", request_id)

    def decode_argument(self, value: bytes, name: str | None = None) -> str:
        """A part of the path, or an argument. No name of anything holds control characters."""
        try:
            text = super().decode_argument(value, name)
        except HTTPError as error:
            raise BadRequest("The address is not valid UTF-8.") from error
        if name is None and _UNPRINTABLE.search(text):
            raise NotFound("There is nothing at this address of the gateway.")
        return text

    @classmethod
    def allowed(cls) -> tuple[str, ...]:
        """The methods that this handler implements."""
        missing = RequestHandler._unimplemented_method
        found = [name for name in _METHODS if getattr(cls, name.lower()) is not missing]
        if "GET" not in found:
            found.remove("HEAD")
        return (*found, "OPTIONS")

    async def head(self, *args: str) -> None:
        """As `get`; tornado leaves the body out."""
        found = self.get(*args)
        if found is not None:
            await found

    def options(self, *args: str) -> None:
        """What may be done here. Nothing is allowed to other origins."""
        self.set_header("Allow", ", ".join(self.allowed()))
        self.set_status(204)

    @property
    def safe_path(self) -> str:
        """The path, and of the query what is known to be no secret."""
        path, _, query = (self.request.uri or "").partition("?")
        shown = [
            (name, value if name in _LOGGED_ARGUMENTS else "...")
            for name, value in parse_qsl(query, keep_blank_values=True)
        ]
        return f"{path}?{urlencode(shown)}" if shown else path

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

    def describe(self, status_code: int, error: BaseException | None) -> tuple[int, dict[str, str]]:
        """The status of an error, and its body: `{"reason", "message", "code"}`."""
        if isinstance(error, GatewayError):
            return error.status, error.as_json()
        known = _KNOWN.get(status_code)
        reason = HTTPStatus(status_code).phrase if status_code in HTTPStatus._value2member_map_ else "Error"
        message = None
        if isinstance(error, HTTPError):
            message = error.log_message % error.args if error.log_message and error.args else error.log_message
            message = message or f"{self.request.method} is not possible here: {reason}."
        else:
            message = (
                "Something unexpected went wrong in the gateway; nothing is lost. "
                f"Try again, and tell the administrator this number if it persists: {self.request_id}."
            )
        code = known.code if known else reason.lower().replace(" ", "_")
        return status_code, {"reason": reason, "message": message, "code": code}

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Every error is JSON."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        status, body = self.describe(status_code, error)
        if of_notebook_server(self.request):
            # JupyterLab shows it in a dialog that breaks no lines, in the middle of words of the server's own.
            body["message"] = f"\n\n{textwrap.fill(body['message'], DIALOG_COLUMNS)}\n\n"
        self.set_status(status)
        self.set_error_headers(status, error)
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.finish(json.dumps(body))

    def set_error_headers(self, status: int, error: BaseException | None) -> None:
        """The headers that go with a status."""
        if isinstance(error, GatewayError) and error.retry_after is not None:
            self.set_header("Retry-After", str(max(1, math.ceil(error.retry_after))))
        if status == 401:
            self.set_header("WWW-Authenticate", "token")
        elif status == 405:
            self.set_header("Allow", ", ".join(self.allowed()))


class APIHandler(BaseHandler):
    """A handler of the REST API: callers are known by the token in their Authorization header, and by nothing else.

    Cookies are not looked at, so that no page in a browser can act for its visitor.
    """

    caller: Caller

    def prepare(self) -> Awaitable[None] | None:
        return None if self.request.method == "OPTIONS" else self.enter()

    async def enter(self) -> None:
        """Find out who is calling. Raises `Unauthenticated`, and what the authenticator raises."""
        token = token_of(self.request)
        if token is None:
            raise Unauthenticated(
                "The request carries no token; send the header `Authorization: token ...` with a token of the Hub."
                if self.services.hub is not None
                else "The request carries no token; send the header `Authorization: token ...` with your token."
            )
        caller = await self.services.authenticator.authenticate(token, remote_ip=self.request.remote_ip or "")
        if caller is None:
            raise Unauthenticated(
                "The token is not valid or has expired; restart your server to get a new one, or log in again."
            )
        self.caller = caller

    def write_json(self, value: Any, status: int = 200) -> None:
        """Answer with JSON."""
        self.set_status(status)
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.write(json.dumps(value))


class NotFoundHandler(BaseHandler):
    """Any other path."""

    def prepare(self) -> None:
        raise HTTPError(404, "There is nothing at this address of the gateway.")


@stream_request_body
class TooLargeHandler(BaseHandler):
    """In the place of the handler that was meant, where the announced body exceeds its limit."""

    def initialize(self, services: Services, limit: int, announced: int) -> None:  # type: ignore[override]
        super().initialize(services)
        self.limit = limit
        if announced > DRAIN_BYTES:
            self.prepare = self.refuse  # type: ignore[method-assign]

    def data_received(self, chunk: bytes) -> None:
        """Thrown away."""

    def refuse(self, *args: str) -> NoReturn:
        """Whatever the method."""
        raise too_large(self.limit)

    get = head = post = put = patch = delete = options = refuse


def token_of(request: HTTPServerRequest) -> str | None:
    """The token of a request's Authorization header."""
    found = _TOKEN.match(request.headers.get("Authorization", ""))
    # jupyter_server without a token sends "token " with nothing behind it: nobody.
    return None if found is None else found[1]


def of_notebook_server(request: HTTPServerRequest) -> bool:
    """Whether jupyter_server's own gateway client asks, which takes tornado's name."""
    return request.headers.get("User-Agent", "").startswith("Tornado/")


def wants_page(request: HTTPServerRequest) -> bool:
    """Whether a person with a browser asks, who would rather read a page than JSON."""
    return request.method in ("GET", "HEAD") and "text/html" in request.headers.get("Accept", "")


def too_large(limit: int) -> PayloadTooLarge:
    """The error for a body over its limit."""
    return PayloadTooLarge(f"The request's body exceeds the limit of {limit} bytes; send less.")


def json_body(handler: BaseHandler) -> dict[str, Any]:
    """The request's body, which must be a JSON object; {} where there is none."""
    body = handler.request.body
    limit = min(handler.max_body_bytes or math.inf, handler.services.web.max_body_bytes)
    if len(body) > limit:
        raise too_large(int(limit))
    if not body.strip():
        return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The request's body is not JSON ({error}); send a JSON object.") from error
    if not isinstance(value, dict):
        raise BadRequest("The request's body must be a JSON object.")
    if _SUSPECT.search(body) and any(_UNSTORABLE.search(text) for text in _strings(value)):
        raise BadRequest("The request's body holds control characters or halves of characters; remove them.")
    return value


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, names too."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += (*one.keys(), *one.values())
        elif isinstance(one, list):
            waiting += one


def string_field(body: Mapping[str, Any], name: str) -> str | None:
    """An optional string of a body. Raises `BadRequest`."""
    value = body.get(name)
    if value is not None and (not isinstance(value, str) or len(value) > MAX_STRING or _UNPRINTABLE.search(value)):
        raise BadRequest(
            f"The field `{name}` must be a string of at most {MAX_STRING} characters, without control characters."
        )
    return value


def log_request(handler: RequestHandler) -> None:
    """tornado's access log: one line a request, no query secrets; successful polls only at debug level."""
    status, seconds = handler.get_status(), handler.request.request_time()
    METRICS.count_request(handler.request.method or "", status, seconds)
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
