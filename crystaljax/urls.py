"""Passwords in URLs: used where a connection is made, and never shown or saved."""

from __future__ import annotations

import re

SECRETS = ("password", "sslpassword")
"""Parameters of a PostgreSQL URL that are passwords."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]*")
_QUERY = re.compile(rf"(?<=[?&])({'|'.join(SECRETS)})=[^&#]*", re.IGNORECASE)


def without_password(text: str, mark: str = "") -> str:
    """A text with the passwords of all URLs in it left out, such as ``postgresql://me@host/results``.

    Whoever connects to it then gives the password in another way: PostgreSQL takes it from the environment variable
    ``PGPASSWORD`` or the file ``~/.pgpass``.

    Args:
        mark: stands in their place, as in ``postgresql://me:***@host/results``.
    """
    return _URL.sub(lambda found: _without(found[0], mark), text)


def passwords(text: str) -> list[str]:
    """The passwords of all URLs in a text, as they are written there."""
    found = []
    for url in _URL.findall(text):
        start, end = _user_password(url)
        found += [url[start + 1 : end]] * (end > start + 1)
        found += [given[0].partition("=")[2] for given in _QUERY.finditer(url)]
    return [password for password in found if password]


def _without(url: str, mark: str) -> str:
    start, end = _user_password(url)
    url = url[:start] + (f":{mark}" if mark and end > start else "") + url[end:]
    if mark:
        return _QUERY.sub(rf"\1={mark}", url)
    url = re.sub(r"([?&])(?:&+|$)", r"\1", _QUERY.sub("", url))
    return url.rstrip("?&") if "?" in url else url


def _user_password(url: str) -> tuple[int, int]:
    """Where ``:password`` begins and ends; an empty range if there is none.

    The password may hold unescaped characters, even a slash where no port can be meant.
    """
    begin = url.index("://") + 3
    stop = min((at for at in (url.find("?", begin), url.find("#", begin)) if at >= 0), default=len(url))
    slash = url.find("/", begin, stop)
    authority_end = stop if slash < 0 else slash
    at, colon = url.rfind("@", begin, authority_end), url.find(":", begin, authority_end)
    if at < 0 and colon >= 0 and not url[colon + 1 : authority_end].isdigit():
        at = url.rfind("@", begin, stop)  # what looked like a host and a port is a user and half a password
    return (colon, at) if 0 <= colon < at else (begin, begin)
