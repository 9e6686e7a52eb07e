"""An error in the form of Anthropic's API, whoever finds it: the server, or the application that an engine brings."""

from __future__ import annotations

PATH = "/v1/messages"  # and what is below
KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
KINDS |= {405: "invalid_request_error", 429: "overloaded_error"}


def anthropic_error(status: int, message: str) -> dict[str, object]:
    return {"type": "error", "error": {"type": KINDS.get(status, "api_error"), "message": message}}
