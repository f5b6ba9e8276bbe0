"""The built-in page: one question, and the answers of the base and the adapters side by side."""

from __future__ import annotations

import html
from importlib.resources import files

__all__ = ["HEADERS", "chat_page"]

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
"""Nothing from elsewhere, and no other site's frame around it."""


def chat_page(base: str) -> str:
    """The page as text; it asks the server for the models' names itself."""
    text = files("veneer.serving").joinpath("templates/chat.html").read_text(encoding="utf-8")
    return text.replace("{{ base }}", html.escape(base))
