"""Redaction: secrets are left out of everything that is saved with a model, reported or published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SECRET_NAMES = ("token", "key", "password", "passwd", "secret", "credential", "credentials")  # Ends of names.
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s?#]*@")
_PARAMETER = re.compile(r"([?&][^=&#\s]*(?:" + "|".join(SECRET_NAMES) + r")=)[^&#\s]*", re.IGNORECASE)


def without_credentials(text: str) -> str:
    """Return a text without user and password in its URLs, and without values of parameters that are secrets."""
    return _PARAMETER.sub(r"\1", _USER.sub(r"\1", text))


def without_secrets(value: Any) -> Any:
    """Return a value, at any depth, without secrets in its mappings and without credentials in its URLs.

    A key of a mapping is a secret if its name ends as one of :data:`SECRET_NAMES` does.
    """
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, Mapping):
        return {name: without_secrets(item) for name, item in value.items() if not is_secret(name)}
    if isinstance(value, (list, tuple)):
        shown = [without_secrets(item) for item in value]
        return shown if isinstance(value, list) else tuple(shown)
    return value


def is_secret(name: Any) -> bool:
    """Tell whether a value of this name must not be shown."""
    return str(name).lower().endswith(SECRET_NAMES)
