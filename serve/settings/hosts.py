"""Hosts, origins and addresses, as text: what is one, and which are the same. Knows no settings and
no protocol; `sections` checks settings with it, `exposure` calls.
"""

from __future__ import annotations

import ipaddress
import re

_NAME = r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+"
_HOST = re.compile(rf"({_NAME})(?::([0-9]{{1,5}}))?")
# As browsers send them (RFC 6454): without a path, and for http and https in lower case and without
# the default port. Of other schemes the host stays as it is (safari-web-extension:// has capitals).
_ORIGIN = re.compile(
    r"(?!https?://[^A-Z]*[A-Z])(?!http://.*:80$)(?!https://.*:443$)"
    rf"[a-z][a-z0-9+.-]*://({_NAME})(:[0-9]{{1,5}})?"
)
DEFAULT_PORTS = {"http": 80, "https": 443}


def is_origin(text: str) -> bool:
    """Whether a browser, or an app made of one, can send this as `Origin`."""
    return text in ("null", "file://") or _ORIGIN.fullmatch(text) is not None


def parse_host(text: str) -> tuple[str, int | None] | None:
    """Name and port of a `Host`, in the one way of writing; None for what is none."""
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
    """Whether a page of this origin came from the server that was called as `host`."""
    page_scheme, _, page = origin.partition("://")
    ours, theirs = parse_host(host), parse_host(page)
    if page_scheme != scheme or ours is None or theirs is None:
        return False
    default = DEFAULT_PORTS.get(scheme)
    return (ours[0], ours[1] or default) == (theirs[0], theirs[1] or default)


def is_loopback(address: str) -> bool:
    """Whether this is an address, and one of its own machine alone."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback
