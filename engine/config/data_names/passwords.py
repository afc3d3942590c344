"""Passwords in URLs: never stored, logged or shown.

A password that was typed into a URL is put aside in this process and a variable of the environment
stands in its stead, so that no table of settings ever holds it: `postgresql://me:secret@host/db`
becomes `postgresql://me:${DB_PASSWORD}@host/db`. Whoever goes on with a run in another process sets
that variable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from engine.errors import ConfigError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_USER = re.compile(r"(?P<head>[A-Za-z][A-Za-z0-9+.\-]*://[^/?#@:]*):(?P<secret>.*)@(?P<rest>[^@]*)")
_PARAMETER = re.compile(
    r"(?P<head>[?&][^=&#]*(?:password|passwd|pwd|passphrase|secret|token|api_?key|credential"
    r"|odbc_connect)[^=&#]*=)(?P<secret>[^&#]*)",
    re.IGNORECASE,
)
_USER_ANYWHERE = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+:/{1,2}[^\s/?#@:'\"]*):(?!\$\{)[^\s/@'\"]+@")
_PARAMETER_ANYWHERE = re.compile(
    r"([?&][^\s=&#'\"]{0,40}(?:password|passwd|pwd|passphrase|secret|token|api_?key|credential)"
    r"[^\s=&#'\"]{0,40}=)(?!\$\{)[^\s&#'\"]+",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(
    r"password|passwd|pwd|passphrase|secret|credential|api_?key|(?:^|_)(?:auth_)?(?:token|key)$",
    re.IGNORECASE,
)
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+:)/(?!/)")
_API_KEY = "--api-key"
_VARIABLE = re.compile(r"\$\{(?:env:)?([A-Za-z_]\w*)\}")
_SHORTEST = 3
"""Shorter secrets are not looked for in messages: they would be met everywhere."""

_aside: dict[str, str] = {}


def hide_password(text: str) -> str:
    """`text` with variables in place of the secrets of a URL; other text as it is."""
    if not URL.match(text):
        return text
    user = _USER.fullmatch(text)
    if user is not None and user["secret"]:
        text = f"{user['head']}:{_variable(user['secret'], 'DB_PASSWORD')}@{user['rest']}"
    return _PARAMETER.sub(
        lambda match: match["head"] + _variable(match["secret"], "DB_SECRET"), text
    )


def hidden(value: Any) -> Any:
    """The value of a setting with `hide_password` done to every text and path in it."""
    if isinstance(value, str):
        return hide_password(value)
    if isinstance(value, Path):  # which makes one slash of two
        text = str(value)
        shown = hide_password(_ONE_SLASH.sub(r"\1//", text, count=1))
        return Path(shown) if shown != _ONE_SLASH.sub(r"\1//", text, count=1) else value
    if isinstance(value, list | tuple):
        return type(value)(map(hidden, value)) if type(value) in (list, tuple) else value
    if type(value) is dict:
        return {key: hidden(item) for key, item in value.items()}
    return value


def shown_value(name: str, value: object) -> str:
    """The value of a key for a message: `***` where the key is called as secrets are."""
    return "***" if _SECRET_NAME.search(name) else scrub(str(value))


def hide_in_words(words: Sequence[str]) -> list[str]:
    """The words of a command without secrets: those of URLs, as in `--data=URL`, and API keys."""
    shown = list[str]()
    for word in words:
        url = URL.search(word)
        if shown and shown[-1] == _API_KEY:
            word = "***"
        elif word.startswith(f"{_API_KEY}="):
            word = f"{_API_KEY}=***"
        elif url is not None:
            word = word[: url.start()] + hide_password(word[url.start() :])
        shown.append(word)
    return shown


def reveal(text: str) -> str:
    """`text` with every `${NAME}` replaced by what was put aside, or by the environment.

    Raises `ConfigError` naming a variable that is not set.
    """
    return _VARIABLE.sub(lambda match: _value(match[1], text), text)


def scrub(text: str) -> str:
    """`text` without the secrets that this process has put aside or expanded, and those of URLs."""
    for secret in sorted(_aside.values(), key=len, reverse=True):
        for spelled in {secret, unquote(secret), quote(unquote(secret), safe="")}:
            if len(spelled) >= _SHORTEST:
                text = text.replace(spelled, "***")
    return _PARAMETER_ANYWHERE.sub(r"\1***", _USER_ANYWHERE.sub(r"\1:***@", text))


def _variable(secret: str, name: str) -> str:
    if not secret or _VARIABLE.fullmatch(secret):
        return secret
    number, chosen = 1, name
    while _aside.get(chosen, secret) != secret:
        number += 1
        chosen = f"{name}_{number}"
    _aside[chosen] = secret
    return f"${{{chosen}}}"


def _value(name: str, text: str) -> str:
    value = _aside.get(name)
    if value is not None:
        return value
    value = os.environ.get(name)
    if value is None:
        raise ConfigError(
            f"{text} asks for the variable {name} of the environment, which is not set. Set it: "
            f"export {name}=..."
        )
    _aside[name] = quote(value, safe="") if URL.match(text) else value
    return _aside[name]
