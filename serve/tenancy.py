"""Keeps tenants apart: the salt decides who shares kept results, running generations and blocks of
the engine's prefix cache; the mark names a tenant in stores without telling who it is.

Always on, whatever the result cache does: a prefix that is already cached is read faster, so
without a salt the time to the first token tells one tenant what another has asked (CVE-2025-46570).
"""

from __future__ import annotations

import hashlib
import hmac


class Tenancy:
    """Marks and salts are HMACs: they tell nothing to whoever does not have the secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._marks: dict[str, bytes] = {}
        self._salts: dict[str, str] = {}

    def mark(self, tenant: str) -> bytes:
        """16 bytes."""
        mark = self._marks.get(tenant)
        if mark is None:  # as many as there are in the keys file
            mark = self._marks[tenant] = self._hmac(b"tenant", tenant.encode())[:16]
        return mark

    def prefix_cache_salt(self, tenant: str, client_salt: str | None) -> str:
        """32 hexadecimal digits. Requests share cached blocks, and results, only where it is equal:
        within one tenant, and there among those that sent the same salt of their own, or none.
        """
        if client_salt is not None:
            return self._hmac(b"salt", self.mark(tenant) + client_salt.encode()).hex()[:32]
        salt = self._salts.get(tenant)
        if salt is None:
            salt = self._salts[tenant] = self._hmac(b"partition", tenant.encode()).hex()[:32]
        return salt

    def _hmac(self, purpose: bytes, text: bytes) -> bytes:
        return hmac.digest(self._secret, purpose + b"\0" + text, hashlib.sha256)
