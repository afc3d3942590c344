"""Errors of the HTTP interface, in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import EngineError

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class ApiError(EngineError):
    """A request that is answered with an error.

    Args:
        status: HTTP's status.
        message: what was found, what was expected and what to do.
        param: the parameter of the request that is to blame.
        code: a word for programs, such as `model_not_found`.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def copy(self) -> ApiError:
        """The same error, to be raised once more: an exception remembers where it has been."""
        return ApiError(
            self.status, str(self), param=self.param, code=self.code, headers=self.headers
        )

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's interface has it."""
        kind = _KINDS.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def wrong(param: str, message: str, code: str | None = None) -> ApiError:
    """A request whose parameter `param` cannot be used."""
    return ApiError(400, message, param=param, code=code)


@dataclass
class Notes:
    """What of a request is read but has no effect, for the answer's `x-engine-ignored` header."""

    ignored: list[str] = field(default_factory=list)

    def headers(self) -> dict[str, str]:
        """The header, in ASCII; nothing where all of the request was used."""
        if not self.ignored:
            return {}
        names = ", ".join(sorted(set(self.ignored))[:32])
        shown = names.encode("ascii", "backslashreplace").decode()
        return {"x-engine-ignored": "".join(c if c.isprintable() else "?" for c in shown)[:1000]}
