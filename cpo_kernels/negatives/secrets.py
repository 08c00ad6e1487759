"""Keys and passwords, and texts of a server that may repeat them."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

SHOWN = 300  # characters of a server's text in a message
PART = 8  # characters in a row that must not be shown either: servers shorten the secrets that they repeat
HIDDEN = "***"


class Secrets:
    """Keys and passwords that must not be shown.

    Args:
        api_key: a key, or None.
        login: a user and a password, or None; a user alone may be a token.
    """

    def __init__(self, api_key: str | None, login: tuple[str, str] | None) -> None:
        self._texts: set[str] = set()
        self.add(api_key or "", *(login or ()))
        if login is not None:
            self.add(base64.b64encode(":".join(login).encode()).decode())

    def add(self, *texts: str) -> None:
        """Add secrets, none of them empty, each in the forms in which a server might repeat it."""
        for text in filter(None, texts):
            self._texts |= {form.lower() for form in (text, quote(text, safe=""), json.dumps(text)[1:-1])}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({HIDDEN})"

    def hidden_in(self, text: str) -> str:
        """Return the beginning of a text, on one line, with :data:`PART` or more characters of any secret hidden."""
        text = "".join(c if c.isprintable() else " " for c in text[: 8 * SHOWN])
        lower = text.lower() if len(text.lower()) == len(text) else text  # a few letters get longer in lower case
        secret = [False] * len(text)
        for own in self._texts:
            width = min(PART, len(own))
            for start in range(len(text) - width + 1):
                if lower[start : start + width] in own:
                    secret[start : start + width] = [True] * width
        shown = [
            c if not hide else (HIDDEN if i == 0 or not secret[i - 1] else "")
            for i, (c, hide) in enumerate(zip(text, secret, strict=True))
        ]
        return " ".join("".join(shown).split())[:SHOWN]
