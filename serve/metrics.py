"""Every Packhorse metric, declared once. Names carry units; labels come from closed sets, never
from a request.

vLLM's own `vllm:*` series live in the same registry, so one scrape shows both. Called by `service`
(counting) and `rest` (exposition).
"""

from __future__ import annotations

import prometheus_client
from packhorse.serve.errors import ErrorKind
from packhorse.serve.telemetry.machine import Gpus, Machine
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

REQUESTS = Counter(
    "packhorse_requests_total",
    "Requests, by how they ended: ok, or the kind of error.",
    ["outcome"],
)
IN_FLIGHT = Gauge(
    "packhorse_requests_in_flight",
    "Requests from their arrival to their last token, the cache's among them.",
)
TOKENS = Counter(
    "packhorse_tokens_total", "Tokens read (prompt) and written (completion).", ["direction"]
)
FIRST_TOKEN_SECONDS = Histogram(
    "packhorse_first_token_seconds",
    "Streams: from the request's arrival to its first chunk.",
    buckets=_SECONDS,
)
REQUEST_SECONDS = Histogram(
    "packhorse_request_seconds",
    "From the request's arrival to its end, however it ended.",
    buckets=_SECONDS,
)
BEFORE_ENGINE_SECONDS = Histogram(
    "packhorse_before_engine_seconds",
    "From the request's arrival to the engine getting it: routing, rendering, the cache's look-up, "
    "admission, and its turn on the adapter.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 30),
)
ADMISSION_REFUSALS = Counter(
    "packhorse_admission_refusals_total",
    "Requests refused at once, by the limit that was met: in_flight, running, queued_tokens, "
    "key_concurrency, key_tokens, key_requests, adapter_waiting, adapters_in_use, engine_queue or "
    "body_bytes.",
    ["reason"],
)
# What known clients send, and engines have no use for. Labels come from here, never from a request.
IGNORED_NAMES = frozenset((
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "best_of", "functions", "function_call", "suffix",
    "use_beam_search", "length_penalty", "modalities", "prediction", "verbosity",
    "stream_options", "response_format", "parallel_tool_calls", "priority", "reasoning_effort",
    "reasoning", "thinking", "enable_thinking", "include", "session_id", "request_id",
    "stream_interval", "return_prompt_text", "mm_processor_kwargs", "media_io_kwargs",
    "guided_decoding_backend", "guided_whitespace_pattern",
    "chat_template_kwargs.enable_thinking", "chat_template_kwargs.thinking", "n_predict",
    "num_ctx", "options", "keep_alive", "format", "think", "template", "tfs_z", "top_a",
    "typical_p", "typical", "mirostat", "mirostat_tau", "mirostat_eta", "dynatemp_range",
    "dry_multiplier", "xtc_probability", "grammar", "cache_prompt", "id_slot", "samplers",
    "add_bos_token", "ban_eos_token", "do_sample", "provider", "models", "transforms", "route",
    "plugins", "usage", "messages.cache_control", "messages.content.cache_control",
    "messages.content.annotations", "messages.content.logprobs", "messages.parsed", "messages.id",
    "messages.status", "messages.timestamp", "messages.reasoning_details",
    "messages.thinking_blocks", "messages.provider_specific_fields",
    "messages.tool_calls.provider_specific_fields",
    "messages.tool_calls.function.parsed_arguments", "messages.tool_calls.extra_content",
    "messages.prefix", "messages.partial", "messages.weight", "messages.metadata",
    "tools.cache_control", "tools.function.cache_control",
))  # fmt: skip
IGNORED_FIELDS = Counter(
    "packhorse_ignored_fields_total",
    "Fields of requests that had no effect, by name; `other` for those that no known client sends.",
    ["field"],
)
WAITING = Gauge(
    "packhorse_requests_waiting", "Admitted requests of which nothing has been answered yet."
)
QUEUED_TOKENS = Gauge("packhorse_queued_tokens", "Prompt tokens of these.")
BODY_BYTES = Gauge(
    "packhorse_body_bytes", "What calls in progress hold of bodies (HTTP) and messages (gRPC)."
)
HTTP_CONNECTIONS = Gauge(
    "packhorse_http_connections", "Open connections, TLS handshakes among them, on all ports."
)
CONNECTIONS_CUT = Counter(
    "packhorse_http_connections_cut_total",
    "Connections that were cut off, by reason: full (refused at the limit), made_room (longest "
    "without a word, at the limit), slow (no whole header in time), large (header), pipelined (too "
    "many requests at once), or unread (the client took nothing of its answer).",
    ["reason"],
)
AUTH_FAILURES = Counter(
    "packhorse_auth_failures_total",
    "Requests without a right to what they ask, by reason: missing, malformed or unknown key, or "
    "scope (a known key that may not); without keys, operators' calls from another machine "
    "(remote), by a proxy (forwarded), for another host, or from another origin's page.",
    ["reason"],
)
KEY_RELOAD_FAILURES = Counter(
    "packhorse_key_reload_failures_total",
    "Changed keys files that could not be read; the old keys stay.",
)
KEYS_STALE = Gauge(
    "packhorse_keys_stale", "1 while the keys file is not what is in use, since it cannot be read."
)
STALLED_CLIENTS = Counter(
    "packhorse_stalled_clients_total", "Clients cut off because they stopped reading their stream."
)
READY = Gauge("packhorse_ready", "1 while new requests are taken, 0 while starting or draining.")

LOOP_LAG = Gauge(
    "packhorse_event_loop_lag_seconds",
    "The longest that the event loop was late within the last minute.",
)
TASKS = Gauge(
    "packhorse_event_loop_tasks", "Tasks of the server's event loop: requests, and some of its own."
)

ENGINE_FAILURES = Counter(
    "packhorse_engine_failures_total",
    "Engines that were lost, by how: died, hung, or not_built (a rebuild that failed).",
    ["reason"],
)
ENGINE_UP = Gauge("packhorse_engine_up", "1 while there is an engine, 0 while one is built.")
REPLAYS = Counter(
    "packhorse_requests_replayed_total",
    "Requests handed to a new engine because theirs died before they had streamed anything.",
)
POISON = Counter("packhorse_requests_poison_total", "Requests found to end the engine; refused.")
POISON_REFUSED = Counter(
    "packhorse_requests_poison_refused_total",
    "Requests refused because they equal one that was found before; no engine had them.",
)
HELD = Gauge(
    "packhorse_requests_held", "Requests that wait for a new engine, or for their turn on it."
)

ADAPTERS = Gauge("packhorse_adapters", "Adapters that are registered.")
ADAPTERS_RESIDENT = Gauge("packhorse_adapters_resident", "Adapters that the engine holds.")
STEP_ADAPTERS = Histogram(
    "packhorse_step_adapters",
    "Adapters with running requests, of each step of the engine; some of them may stand still.",
    buckets=(0, 1, 2, 3, 4, 8, 16, 32),
)
ADAPTER_WAITING = Gauge(
    "packhorse_adapter_requests_waiting",
    "Requests that wait for their turn on an adapter.",
    ["adapter"],
)
ADAPTER_FOLDER_DOUBTS = Counter(
    "packhorse_adapter_folder_doubts_total",
    "Looks at the watched folder that missed adapters and removed none, by reason: away (it cannot "
    "be read), empty, changed (another folder or mount is in its place), or unreadable (an adapter "
    "is listed, and its files cannot be had).",
    ["reason"],
)
ADAPTER_FAILURES = Counter(
    "packhorse_adapter_failures_total",
    "Adapters, or new versions of one, that were refused or could not be loaded.",
)
ADAPTER_EVICTIONS = Counter(
    "packhorse_adapter_evictions_total", "Adapters unloaded to make room for others."
)
ADAPTER_LOAD_SECONDS = Histogram(
    "packhorse_adapter_load_seconds", "Loading an adapter into the engine.", buckets=_SECONDS
)

ROUTES = Counter(
    "packhorse_routes_total",
    "Requests by where they went and which stage said so: explicit (the request's own name), "
    "rules, learned, or default. The adapter is empty for the base.",
    ["adapter", "stage"],
)
ROUTE_SECONDS = Histogram(
    "packhorse_route_seconds",
    "Choosing an adapter by a request's text.",
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1),
)
ROUTE_GENERATION = Gauge("packhorse_route_generation", "Number of the routing in use.")
ROUTE_REFUSALS = Counter(
    "packhorse_route_reloads_refused_total",
    "New routes that did worse in their self-test than they may; the old ones stay.",
)

CACHE_LOOKUPS = Counter(
    "packhorse_cache_lookups_total",
    "Look-ups of results, by tier (memory, store) and outcome: hit, miss, old (older than the "
    "request takes), damaged, or failed (no answer from the store).",
    ["tier", "outcome"],
)
CACHE_STORES = Counter(
    "packhorse_cache_results_total",
    "Finished results, by outcome: kept, too_large, or failed (the store did not take it).",
    ["outcome"],
)
CACHE_COALESCED = Counter(
    "packhorse_cache_coalesced_total", "Requests that joined an equal one's generation."
)
CACHE_SAVED_TOKENS = Counter(
    "packhorse_cache_saved_tokens_total", "Tokens answered that the engine did not have to write."
)
CACHE_BYTES = Gauge("packhorse_cache_memory_bytes", "What the results in memory take.")
CACHE_ENTRIES = Gauge("packhorse_cache_memory_entries", "Results in memory.")
CACHE_EVICTIONS = Counter(
    "packhorse_cache_evictions_total", "Results dropped from memory to make room for others."
)
CACHE_FLUSHES = Counter("packhorse_cache_flushes_total", "Flushes asked of this replica.")
CACHE_STORE_UP = Gauge(
    "packhorse_cache_store_up", "1 while the shared store is used, 0 while the breaker is open."
)
CACHE_STORE_FAILURES = Counter(
    "packhorse_cache_store_failures_total",
    "Calls to the shared store that failed, by reason: timeout, refused, or error.",
    ["reason"],
)


# What has series by adapter.
BY_ADAPTER: tuple[Counter | Gauge, ...] = (ADAPTER_WAITING, ROUTES)

# Every value that labels of a closed set can have. A rate of what happens for the first
# time is seen only where there was a 0 before it.
CLOSED: dict[Counter, tuple[str, ...]] = {
    REQUESTS: ("ok", *map(str, ErrorKind)),
    TOKENS: ("prompt", "completion"),
    ENGINE_FAILURES: ("died", "hung", "not_built"),
    ADAPTER_FOLDER_DOUBTS: ("away", "empty", "changed", "unreadable"),
    AUTH_FAILURES: (
        "missing", "malformed", "unknown", "scope", "remote", "forwarded", "host", "origin",
    ),
    ADMISSION_REFUSALS: (
        "in_flight", "running", "queued_tokens", "key_concurrency", "key_tokens", "key_requests",
        "adapter_waiting", "adapters_in_use", "engine_queue", "body_bytes",
    ),
    CONNECTIONS_CUT: ("full", "made_room", "slow", "large", "pipelined", "unread"),
    IGNORED_FIELDS: ("other", *sorted(IGNORED_NAMES)),
    CACHE_STORES: ("kept", "too_large", "failed"),
    CACHE_STORE_FAILURES: ("timeout", "refused", "error"),
}  # fmt: skip
for _counter, _values in CLOSED.items():
    for _value in _values:
        _counter.labels(_value)

MACHINE, GPUS = Machine(), Gpus()
REGISTRY.register(MACHINE)
REGISTRY.register(GPUS)


def forget_adapter(name: str) -> None:
    """Take the series of an adapter that is gone from every metric that has them. Not before its
    last request has ended: that one would bring them back.
    """
    for metric in BY_ADAPTER:
        metric.remove_by_labels({"adapter": name})


def held() -> float:
    """How many requests wait for an engine."""
    return sum(sample.value for metric in HELD.collect() for sample in metric.samples)


def adapters_waiting() -> dict[str, int]:
    """Adapters that requests wait for, and how many do."""
    samples = [sample for metric in ADAPTER_WAITING.collect() for sample in metric.samples]
    return {sample.labels["adapter"]: int(sample.value) for sample in samples if sample.value > 0}


def exposition() -> tuple[bytes, str]:
    """The whole registry in Prometheus' text format, and its content type."""
    return prometheus_client.generate_latest(), prometheus_client.CONTENT_TYPE_LATEST
