"""Hosts, origins and IP addresses as text: parsing, normal forms, comparison. Knows no settings and
no protocol. Used by settings/http.py to check settings, and by access/exposure.py to check calls.
"""

from __future__ import annotations

import ipaddress
import re

_NAME = r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+"
_HOST = re.compile(rf"({_NAME})(?::([0-9]{{1,5}}))?")
# Origins as browsers send them (RFC 6454): without a path; for http and https in lower case and
# without the default port. Other schemes keep capitals (safari-web-extension:// has some).
_ORIGIN = re.compile(
    r"(?!https?://[^A-Z]*[A-Z])(?!http://.*:80$)(?!https://.*:443$)"
    rf"[a-z][a-z0-9+.-]*://({_NAME})(:[0-9]{{1,5}})?"
)
DEFAULT_PORTS = {"http": 80, "https": 443}


def is_origin(text: str) -> bool:
    """Whether a browser, or an app built on one, can send this text as `Origin`."""
    return text in ("null", "file://") or _ORIGIN.fullmatch(text) is not None


def parse_host(text: str) -> tuple[str, int | None] | None:
    """Name (in canonical form) and port of a `Host` header; None if it is not a valid one."""
    found = _HOST.fullmatch(text)
    if found is None:
        return None
    return canonical(found[1]), int(found[2]) if found[2] else None


def canonical(name: str) -> str:
    """Names in lower case, addresses in their shortest form and without brackets."""
    try:
        return str(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
    except ValueError:
        return name.lower()


def is_same_origin(origin: str, scheme: str, host: str) -> bool:
    """Whether this origin is that of the server that was called as `scheme`://`host`."""
    page_scheme, _, page = origin.partition("://")
    ours, theirs = parse_host(host), parse_host(page)
    if page_scheme != scheme or ours is None or theirs is None:
        return False
    default = DEFAULT_PORTS.get(scheme)
    return (ours[0], ours[1] or default) == (theirs[0], theirs[1] or default)


def is_loopback(address: str) -> bool:
    """Whether the text is an IP address of the loopback interface."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback
