"""Where a call comes from, and whether a server without keys answers it.

With keys, a key's scopes say what its caller may do. Without keys, operators' calls are answered to
callers on this machine: the connection comes from a loopback address, no proxy has forwarded the
call, and no foreign web page has made it.

Not detected: a proxy on this machine that adds no header and does not keep Host (nginx's bare
`proxy_pass`) looks like a local user; set keys behind one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from packhorse.serve.errors import Forbidden, StartupError
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.settings.auth import AuthSettings, WithoutKeys
from packhorse.serve.settings.hosts import canonical, is_loopback, is_same_origin, parse_host
from packhorse.serve.settings.http import HttpSettings
from packhorse.serve.settings.rpc import RpcSettings

UNIX = "unix"  # the peer of a Unix domain socket
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
# Origins that any page can have: a sandboxed frame has `null`.
SHARED_ORIGINS = frozenset({"*", "null"})
# Headers that proxies, load balancers and tunnels add; a local call has none.
FORWARDED = frozenset({
    "forwarded", "via", "cdn-loop", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "x-host",
    "x-remote-addr", "x-remote-ip", "x-proxyuser-ip", "x-amzn-trace-id", "true-client-ip",
    "client-ip", "proxy-client-ip", "wl-proxy-client-ip", "fastly-client-ip", "fly-client-ip",
})  # fmt: skip
FORWARDED_PREFIXES = (
    "x-forwarded", "x-original-", "x-envoy-", "x-appengine-", "x-azure-", "x-arr-", "x-vercel-",
    "cf-", "fly-forwarded-", "tailscale-", "ngrok-",
)  # fmt: skip
WAYS_OUT = (
    "Without keys, operators' calls are answered on the server's own machine alone. Set "
    "auth.admin_key or auth.keys_file, give operators a port of their own (http.admin_port), or "
    "open it with auth.without_keys: everything."
)
SHOWN = 100


@dataclass(frozen=True, slots=True)
class Sender:
    """Where a call comes from, as its connection and its headers say.

    `peer` is the address at the other end, None when it is not known; `headers` have names in lower
    case; `arrived_at` is the address of ours that was connected to.
    """

    peer: str | None
    headers: Sequence[tuple[str, str]]
    scheme: str = "http"
    arrived_at: str | None = None

    @property
    def is_local(self) -> bool:
        return self.peer is not None and (self.peer == UNIX or is_loopback(self.peer))

    @property
    def forwarded(self) -> str | None:
        """The name of a header that shows that a proxy has forwarded the call, if there is one."""
        for name, _ in self.headers:
            if name in FORWARDED or name.startswith(FORWARDED_PREFIXES):
                return name
        return None

    def values(self, name: str) -> list[str]:
        return [value for found, value in self.headers if found == name]


class Exposure:
    """Whose operators' calls are answered on a listener of a server without keys."""

    def __init__(
        self,
        without_keys: WithoutKeys,
        *,
        allowed_hosts: Iterable[str] | None = None,
        cors_origins: Iterable[str] = (),
        own_listener: str | None = None,
        metrics: ServerMetrics | None = None,
    ) -> None:
        """`allowed_hosts` None: this machine's names; any host with `everything`. `own_listener` is
        the host of a listener that only operators have.
        """
        self._metrics = metrics or ServerMetrics()
        if allowed_hosts is None and without_keys != "everything":
            allowed_hosts = LOCAL_HOSTS
        self._hosts = None if allowed_hosts is None else tuple(allowed_hosts)
        self._parsed = {parse_host(host) for host in self._hosts or ()}
        self._origins = frozenset(cors_origins) - SHARED_ORIGINS
        self._own_listener = own_listener
        self._anywhere = own_listener is not None or without_keys == "everything"

    def check(self, sender: Sender) -> None:
        """Raises Forbidden."""
        if not self._anywhere:
            if not sender.is_local:
                peer = sender.peer or "an address that is not known"
                raise self._forbidden(
                    "remote", f"This call comes from {peer}, not from here. {WAYS_OUT}"
                )
            if name := sender.forwarded:
                raise self._forbidden(
                    "forwarded", f"A proxy has passed this on ({name}). {WAYS_OUT}"
                )
        hosts = sender.values("host")
        if self._hosts is not None:
            for host in hosts:
                if not self._is_ours(host, sender.arrived_at):
                    raise self._forbidden(
                        "host",
                        f"Host {host[:SHOWN]!r} is none of http.allowed_hosts "
                        f"({', '.join(self._hosts)}), so a web page may be behind this; add it "
                        "there, or set auth.admin_key or auth.keys_file.",
                    )
        for origin in sender.values("origin"):
            is_same = len(hosts) == 1 and is_same_origin(origin, sender.scheme, hosts[0])
            if not is_same and origin not in self._origins:
                raise self._forbidden(
                    "origin",
                    f"The web page of origin {origin[:SHOWN]!r} may make no operators' calls on a "
                    "server without keys; name it in http.cors_origins (`*` and `null` do not "
                    "count here), or set auth.admin_key or auth.keys_file.",
                )

    def _is_ours(self, host: str, arrived_at: str | None) -> bool:
        parsed = parse_host(host)
        if parsed is None:
            return False
        name, _ = parsed
        if parsed in self._parsed or (name, None) in self._parsed:
            return True
        if self._own_listener is None:
            return False
        # A page can point a name of its own here, but not use our address as its name.
        return name in {canonical(self._own_listener), canonical(arrived_at or "")}

    def _forbidden(self, reason: str, message: str) -> Forbidden:
        self._metrics.auth_failures.labels(reason).inc()
        return Forbidden(message)


def check_listeners(auth: AuthSettings, http: HttpSettings, rpc: RpcSettings) -> None:
    """Raises StartupError when a server without keys would listen on an address that
    `auth.without_keys` does not allow.
    """
    if auth.has_keys or auth.without_keys != "loopback":
        return
    hosts = {"http.host": http.host}
    if http.admin_port is not None:
        hosts["http.admin_host"] = http.admin_host
    if rpc.port is not None:
        hosts["rpc.host"] = rpc.host
    for name, host in hosts.items():
        if host != "localhost" and not is_loopback(host):
            raise StartupError(
                f"There are no API keys, and with auth.without_keys: loopback a server without "
                f"keys does not listen on {name} {host}, where others may reach it. Set "
                "auth.keys_file (or auth.api_key and auth.admin_key); or "
                "PACKHORSE_AUTH__WITHOUT_KEYS=inference, and everybody who reaches it may infer "
                "and read /metrics; or listen on 127.0.0.1. (The image sets "
                "PACKHORSE_AUTH__WITHOUT_KEYS=loopback, which is stronger than a file.)"
            )
