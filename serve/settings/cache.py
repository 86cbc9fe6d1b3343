"""Settings of the result cache (cache/), see docs/caching.md."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr, field_validator, model_validator

from packhorse.serve.settings.section import Section, stripped


class CacheSettings(Section):
    enabled: bool = True
    memory_bytes: int = Field(256 * 2**20, ge=0)
    """Size of the memory tier in this process, an LRU cache. 0: no memory tier."""
    ttl_s: float = Field(24 * 3600.0, gt=0)
    """Older results are not returned."""
    max_entry_bytes: int = Field(2**20, ge=1)
    """Larger results are not cached."""
    store: SecretStr | None = None
    """URL of the store that replicas share: redis://HOST:PORT/DB, rediss:// (TLS), unix://PATH, or
    memcached://HOST:PORT. Needs `secret`.
    """
    secret: SecretStr | None = None
    """Key of the hashes that tell tenants apart and of the entries' checksums; the same for all
    replicas. Unset: a new random one at each start.
    """
    prefix: str = Field("packhorse", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Prefix of the key names in the store."""
    timeout_s: float = Field(0.1, gt=0, le=10)
    """Time limit of one call to the store; after it the engine generates the answer."""
    digests_file: Path | None = None
    """Remembers the digests of weight files, so that each file is read once. Unset:
    packhorse/digests.json in the user's cache folder.
    """

    @field_validator("store")
    @classmethod
    def _is_a_store(cls, store: SecretStr | None) -> SecretStr | None:
        # The message leaves the value out: it may hold a password.
        schemes = ("redis://", "rediss://", "unix://", "memcached://")
        if store is not None and not store.get_secret_value().startswith(schemes):
            raise ValueError(f"must begin with one of {', '.join(schemes)}")
        return store

    @field_validator("secret")
    @classmethod
    def _is_long(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is None:
            return None
        secret = stripped(
            secret
        )  # else a replica whose secret ends with a newline would share nothing
        if len(secret.get_secret_value()) < 16:
            raise ValueError("must have at least 16 characters; `openssl rand -hex 32` makes one")
        return secret

    @model_validator(mode="after")
    def _store_has_secret(self) -> CacheSettings:
        if self.store is not None and self.secret is None:
            raise ValueError(
                "cache.store needs cache.secret, the same for all replicas, or nothing could be "
                "shared; `openssl rand -hex 32` makes one"
            )
        return self
