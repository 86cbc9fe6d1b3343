"""API keys: who calls, and what they may do. A key is looked up by its sha256; the key itself is
never on disk, in logs or in errors.

A plain sha256 is enough, because a key is 256 random bits made by `packhorse keys new`: nobody can
guess it, however fast the hash. A slow password hash would cost its time on every request.

`rest` and `rpc` identify callers and check scopes; quotas are checked by `limits.admission`.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from packhorse.serve.errors import Forbidden, StartupError, Unauthenticated
from packhorse.serve.messages import ANONYMOUS, SCOPES, Caller, Scope
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.settings.auth import AuthSettings, WithoutKeys
from packhorse.serve.settings.section import stripped

logger = logging.getLogger("packhorse.auth")

MIN_KEY_CHARACTERS = 16
LOOK_EVERY_S = 1.0
# The callers of the two keys that can be set without a file.
API_KEY = Caller("api-key", "api-key", frozenset({"inference", "metrics"}))
ADMIN_KEY = Caller("admin-key", "admin-key", frozenset(SCOPES))
# What a server without keys logs at its start.
OPEN: dict[WithoutKeys, str] = {
    "loopback": "everybody on this machine may infer, read /metrics and make operators' calls",
    "inference": "everybody who reaches this server may infer and read /metrics; operators' calls "
    "are answered to callers on this machine, and on http.admin_port if there is one",
    "everything": "everybody who reaches this server may use all of it, operators' calls included",
}

# Names go to logs and error messages, so they are kept harmless.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Quota = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    # No input in errors: people paste plain keys into the file.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class Quotas(_Strict):
    max_concurrent: Quota | None = None
    tokens_per_minute: Quota | None = None
    requests_per_minute: Quota | None = None


class KeyEntry(_Strict):
    """One key, as the keys file has it."""

    name: Name
    tenant: Name | None = None
    """The key's own name when unset."""
    scopes: Annotated[list[Scope], Field(min_length=1)] = ["inference"]
    base: bool = True
    """Whether the key may use the base model itself."""
    adapters: Annotated[list[str], Field(min_length=1)] = ["*"]
    quotas: Quotas = Quotas()
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    def caller(self) -> Caller:
        return Caller(
            name=self.name,
            tenant=self.tenant or self.name,
            scopes=frozenset(self.scopes),
            base=self.base,
            adapters=None if "*" in self.adapters else frozenset(self.adapters),
            max_concurrent=self.quotas.max_concurrent,
            tokens_per_minute=self.quotas.tokens_per_minute,
            requests_per_minute=self.quotas.requests_per_minute,
        )


_ENTRIES = TypeAdapter(list[KeyEntry])
# Requests wait while a changed file is read; the loader in C is ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def new_key() -> str:
    """A new key: 256 random bits, with a prefix that secret scanners can recognize."""
    return "ph-" + secrets.token_urlsafe(32)


def entry_of(key: str, **fields: object) -> str:
    """The YAML entry for a keys file. Raises StartupError for a field that is not allowed there."""
    entry = {**fields, "sha256": hashlib.sha256(key.encode()).hexdigest()}
    _validated([entry], "The new key")
    return yaml.safe_dump([entry], sort_keys=False, default_flow_style=None, width=1000)


def read_keys(path: Path) -> list[tuple[bytes, Caller]]:
    """Hashes and callers of a keys file. Raises StartupError with the place and the fix."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    except OSError as error:
        raise StartupError(f"{path}: cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Only the place, because YAML's own message quotes the file.
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise StartupError(f"{path}: {line}not valid YAML or JSON.") from error
    if not isinstance(document, list) or not document:
        raise StartupError(
            f"{path}: must be a list of at least one key; `packhorse keys new` prints an entry. "
            "To run without keys, leave the setting out."
        )
    entries = _validated(document, str(path))
    for field in ("name", "sha256"):
        seen: dict[str, int] = {}
        for number, entry in enumerate(entries, start=1):
            value = getattr(entry, field)
            if value in seen:
                raise StartupError(
                    f"{path}: entries {seen[value]} and {number} have the same {field} "
                    f"({value!r}); give each key its own."
                )
            seen[value] = number
    return [(bytes.fromhex(entry.sha256), entry.caller()) for entry in entries]


def _validated(document: list[object], where: str) -> list[KeyEntry]:
    try:
        return _ENTRIES.validate_python(document)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        number, *place = fault["loc"]
        field = ".".join(map(str, place)) or "the entry"
        hint = fault["msg"]
        if fault["type"] == "extra_forbidden":
            model: type[BaseModel] = Quotas if place[0] == "quotas" else KeyEntry
            hint = f"there is no such field; the fields are {', '.join(model.model_fields)}"
        elif fault["type"] == "missing":
            hint = "is missing"
        elif fault["type"] == "model_type":
            hint = "must be a mapping with at least name and sha256"
        elif fault["type"] == "string_pattern_mismatch":
            hint = "must be 1 to 64 of A-Z a-z 0-9 . _ -, a letter or digit first"
            if place == ["sha256"]:
                hint = "must be the key's hash, 64 of 0-9 a-f; `packhorse keys new` prints it"
        raise StartupError(f"{where}: entry {int(number) + 1}: {field}: {hint}.") from None


class Keys:
    """The keys of a server, read again when their file changes."""

    def __init__(
        self,
        settings: AuthSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        metrics: ServerMetrics | None = None,
    ) -> None:
        """Raises StartupError. Without keys, warns who may do what."""
        self._metrics = metrics or ServerMetrics()
        self._path = settings.keys_file
        self.open_metrics = settings.open_metrics
        self.without_keys = None if settings.has_keys else settings.without_keys
        """What callers may do on a server without keys; None on a server with keys."""
        self._clock = clock
        self._looked_s = clock()
        self._known: list[tuple[bytes, Caller]] = []
        self._state = self._stat()
        given = {
            "auth.api_key": (settings.api_key, API_KEY),
            "auth.admin_key": (settings.admin_key, ADMIN_KEY),
        }
        single = {name: (key, caller) for name, (key, caller) in given.items() if key is not None}
        if self._path is not None:
            if single:
                raise StartupError(
                    f"auth.keys_file and {' and '.join(single)} are set; put the keys into the "
                    "file, or leave the file out."
                )
            self._known = read_keys(self._path)
            logger.info("%d API keys from %s", len(self._known), self._path)
        elif single:
            self._known = [(_digest(name, key), caller) for name, (key, caller) in single.items()]
            if len({digest for digest, _ in self._known}) < len(self._known):
                raise StartupError(
                    "auth.api_key and auth.admin_key are the same; give operators one of their own."
                )
            logger.info("API keys from the settings: %s", ", ".join(single))
        else:
            logger.warning(
                "No API keys are set, and auth.without_keys is %s: %s, as tenant %s (see "
                "docs/access.md)",
                settings.without_keys,
                OPEN[settings.without_keys],
                ANONYMOUS.tenant,
            )

    def caller(self, authorization: bytes | None) -> Caller:
        """Who sent this `Authorization` header. Raises Unauthenticated."""
        self._look()
        if not self._known:
            return ANONYMOUS
        if authorization is None:
            raise self._unauthenticated("missing", "This server needs an API key")
        scheme, _, key = authorization.partition(b" ")
        key = key.strip()
        if scheme.lower() != b"bearer" or not key:
            raise self._unauthenticated("malformed", "The Authorization header is not understood")
        given = hashlib.sha256(key).digest()
        found: Caller | None = None
        for digest, caller in self._known:  # all of them, so that the time reveals nothing
            if hmac.compare_digest(digest, given):
                found = caller
        if found is None:
            raise self._unauthenticated("unknown", "There is no such API key here, or not any more")
        return found

    def again(self, name: str, tenant: str) -> Caller:
        """The caller of this name as it is now, for work that goes on after its call. Raises
        Unauthenticated when there is no such key of the tenant any more.
        """
        self._look()
        known = [caller for _, caller in self._known] or [ANONYMOUS]
        for caller in known:
            if (caller.name, caller.tenant) == (name, tenant):
                return caller
        raise Unauthenticated(
            f"There is no key {name!r} of the tenant {tenant!r} any more; work that was begun with "
            "it does not go on."
        )

    def check_scope(self, caller: Caller, scope: Scope) -> None:
        """Raises Forbidden when the caller's key does not have the scope."""
        if scope in caller.scopes:
            return
        self._metrics.auth_failures.labels("scope").inc()
        if caller is API_KEY:
            raise Forbidden(
                f"The key of auth.api_key is for inference and metrics, and this needs {scope}; "
                "call with the key of auth.admin_key, which the operator can set."
            )
        raise Forbidden(
            f"The key {caller.name!r} has the scopes {', '.join(sorted(caller.scopes))}, and this "
            f"needs {scope}; ask the operator for a key that has it."
        )

    def _unauthenticated(self, reason: str, message: str) -> Unauthenticated:
        self._metrics.auth_failures.labels(reason).inc()
        return Unauthenticated(f"{message}; send `Authorization: Bearer KEY`.")

    def _look(self) -> None:
        """Read the file again if it has changed, at most once a second. A broken file changes
        nothing, and is logged once.
        """
        if self._path is None:
            return
        now_s = self._clock()
        if now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now_s
        state = self._stat()
        if state == self._state:
            return
        self._state = state
        try:
            self._known = read_keys(self._path)
        except StartupError as error:
            self._metrics.key_reload_failures.inc()
            self._metrics.keys_stale.set(1)
            logger.error("%s The keys stay as they were.", error)
        else:
            self._metrics.keys_stale.set(0)
            logger.info("%d API keys from %s, which has changed", len(self._known), self._path)

    def _stat(self) -> tuple[int, ...] | None:
        if self._path is None:
            return None
        try:
            stat = self._path.stat()
        except OSError:
            return None
        # ctime: a file that became readable has changed too.
        return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


def _digest(name: str, secret: SecretStr) -> bytes:
    """The sha256 of a key in the settings. Raises StartupError, which does not quote the key."""
    key = stripped(secret).get_secret_value()
    if len(key) < MIN_KEY_CHARACTERS or not re.fullmatch(r"[!-~]+", key):
        raise StartupError(
            f"{name} must be at least {MIN_KEY_CHARACTERS} ASCII characters without spaces, ends "
            "of lines or control characters, which a header cannot hold; `packhorse keys new` "
            "makes one."
        )
    if key != secret.get_secret_value():
        logger.warning(
            "%s has white space or an end of line around it, which no header can hold: the key is "
            "what is between (write it with printf, not echo)",
            name,
        )
    return hashlib.sha256(key.encode()).digest()
