"""What can go wrong, as it is said to a user.

Every error that may reach a client is a `GatewayError`. Anything else is a defect: the client gets
a general sentence with the request's id, and the traceback goes to the log.

    GatewayError
    ├── BadRequest            400  the request cannot be understood
    ├── Unauthenticated       401  no token, or one that nobody issued
    ├── Forbidden             403  the caller is known but may not do this
    │   └── LaunchRefused     403  a policy or limit does not admit the launch
    ├── NotFound              404  it is proven not to exist (or not to be the caller's)
    ├── Conflict              409  it exists but is not in a state for this
    ├── PayloadTooLarge       413  a body or a value exceeds its limit
    ├── TooManyRequests       429  slow down
    ├── LaunchFailed          500  the resource manager or the kernel itself refused to start
    └── Unavailable           503  it is not known now; the same request may work later
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BadRequest",
    "Conflict",
    "Forbidden",
    "GatewayError",
    "LaunchFailed",
    "LaunchRefused",
    "NotFound",
    "PayloadTooLarge",
    "TooManyRequests",
    "Unauthenticated",
    "Unavailable",
]


class GatewayError(Exception):
    """An error whose sentence may be shown to the user.

    `message` is one complete sentence: what happened, why, what to do. `hint` is for the operator
    and goes to the log only. `code` is stable and for programs.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    reason: ClassVar[str] = "Internal error"

    def __init__(self, message: str, *, hint: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.retry_after = retry_after

    def as_json(self) -> dict[str, str]:
        """The body of the response: `{"reason", "message", "code"}`."""
        return {"reason": self.reason, "message": self.message, "code": self.code}


class BadRequest(GatewayError):
    """The request cannot be understood: malformed JSON, a missing field, an illegal value."""

    status = 400
    code = "bad_request"
    reason = "Bad request"


class Unauthenticated(GatewayError):
    """The request carries no token, or one that is unknown or has expired."""

    status = 401
    code = "unauthenticated"
    reason = "Not authenticated"


class Forbidden(GatewayError):
    """The caller is known but may not do this."""

    status = 403
    code = "forbidden"
    reason = "Not allowed"


class LaunchRefused(Forbidden):
    """A policy or a limit does not admit the launch; nothing was started.

    `policy` is its name, `resource` what it limits; both are empty where no policy is the reason.
    """

    code = "launch_refused"
    reason = "Launch refused"
    policy: str = ""
    resource: str = ""


class NotFound(GatewayError):
    """It is proven not to exist, or it belongs to somebody else (which must look the same)."""

    status = 404
    code = "not_found"
    reason = "Not found"


class Conflict(GatewayError):
    """The object exists but is not in a state in which this can be done."""

    status = 409
    code = "conflict"
    reason = "Conflict"


class PayloadTooLarge(GatewayError):
    """A body, a value or a message exceeds its limit."""

    status = 413
    code = "payload_too_large"
    reason = "Too large"


class TooManyRequests(GatewayError):
    """The caller is over a rate limit."""

    status = 429
    code = "too_many_requests"
    reason = "Too many requests"


class LaunchFailed(GatewayError):
    """The resource manager, the node or the kernel itself refused to start."""

    code = "launch_failed"
    reason = "Launch failed"


class Unavailable(GatewayError):
    """Whether it exists or is allowed cannot be told now (database, Hub or cluster unreachable)."""

    status = 503
    code = "unavailable"
    reason = "Unavailable"
