"""Every Packhorse metric, declared once. Names carry units; labels come from closed sets, never
from a request.

`ServerMetrics` are those of a process and its listeners, `ModelMetrics` those of one served model.
Both are made where a server is built, and handed to whoever counts. The label `model` is added when
somebody scrapes (`Exposition`), so that counting costs nothing more and several models, or several
servers in one process, never collide. vLLM's own `vllm:*` series are in Prometheus' global
registry, and on the same page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import prometheus_client
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from packhorse.serve.errors import ErrorKind
from packhorse.serve.telemetry.machine import Gpus, Machine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

# Metrics that had another name in the release before: exported under both until the next one.
RENAMED = {
    "packhorse_frontend_seconds": "packhorse_before_engine_seconds",
    "packhorse_time_to_first_token_seconds": "packhorse_first_token_seconds",
    "packhorse_requests_waiting_for_engine": "packhorse_requests_held",
    "packhorse_active_loras_per_step": "packhorse_step_adapters",
}

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
    "thinking.budget_tokens", "output_config.effort", "context_management", "betas", "container",
    "mcp_servers", "diagnostics", "inference_geo", "speed", "user_profile_id", "workspace_id",
    "tools.defer_loading", "tools.allowed_callers", "tools.input_examples",
    "tools.bash_20250124", "tools.text_editor_20250728", "tools.web_search_20250305",
    "tools.web_fetch_20250910", "tools.memory_20250818",
    "messages.content.redacted_thinking", "messages.prefix", "messages.partial",
    "messages.weight", "messages.metadata",
    "tools.cache_control", "tools.function.cache_control", "include.reasoning.encrypted_content",
    "reasoning.summary", "reasoning.effort", "text.verbosity", "client_metadata",
    "prompt_cache_options", "max_tool_calls", "tools.web_search", "tools.web_search_preview",
    "tools.file_search", "tools.code_interpreter", "tools.image_generation", "tools.local_shell",
    "tools.shell", "tools.mcp", "tools.apply_patch", "tools.tool_search", "tools.format",
))  # fmt: skip


@dataclass(frozen=True)
class _Make:
    """Makes metrics in one registry."""

    registry: CollectorRegistry

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, *, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)


def _begin(closed: dict[Counter, tuple[str, ...]]) -> None:
    """Make the series of every label value. A rate of what happens for the first time is seen only
    where there was a 0 before it.
    """
    for counter, values in closed.items():
        for value in values:
            counter.labels(value)


class ServerMetrics:
    """Of a process and its listeners."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make = _Make(self.registry)
        self.body_bytes = make.gauge(
            "packhorse_body_bytes",
            "What calls in progress hold of bodies (HTTP) and messages (gRPC).",
        )
        self.http_connections = make.gauge(
            "packhorse_http_connections",
            "Open connections, TLS handshakes among them, on all ports.",
        )
        self.connections_cut = make.counter(
            "packhorse_http_connections_cut_total",
            "Connections that were cut off, by reason: full (refused at the limit), made_room "
            "(longest without a word, at the limit), slow (no whole header in time), large "
            "(header), pipelined (too many requests at once), or unread (the client took nothing "
            "of its answer).",
            ["reason"],
        )
        self.auth_failures = make.counter(
            "packhorse_auth_failures_total",
            "Requests without a right to what they ask, by reason: missing, malformed or unknown "
            "key, or scope (a known key that may not); without keys, operators' calls from another "
            "machine (remote), by a proxy (forwarded), for another host, or from another origin's "
            "page.",
            ["reason"],
        )
        self.key_reload_failures = make.counter(
            "packhorse_key_reload_failures_total",
            "Changed keys files that could not be read; the old keys stay.",
        )
        self.keys_stale = make.gauge(
            "packhorse_keys_stale",
            "1 while the keys file is not what is in use, since it cannot be read.",
        )
        self.batch_lines = make.counter(
            "packhorse_batch_lines_total",
            "Times that a line of a batch was run, by what came of it: answered, failed (an error "
            "that its batch keeps), postponed (refused for the moment, by a quota or a full "
            "server), or preempted (ended for a live call; it runs again).",
            ["outcome"],
        )
        self.batches_unfinished = make.gauge(
            "packhorse_batches_unfinished", "Batches that have not ended."
        )
        self.stalled_clients = make.counter(
            "packhorse_stalled_clients_total",
            "Clients cut off because they stopped reading their stream.",
        )
        self.ready = make.gauge(
            "packhorse_ready", "1 while new requests are taken, 0 while starting or draining."
        )
        self.loop_lag = make.gauge(
            "packhorse_event_loop_lag_seconds",
            "The longest that the event loop was late within the last minute.",
        )
        self.tasks = make.gauge(
            "packhorse_event_loop_tasks",
            "Tasks of the server's event loop: requests, and some of its own.",
        )
        self.responses_kept = make.gauge(
            "packhorse_responses_kept", "Responses that this process keeps in memory."
        )
        self.responses_kept_bytes = make.gauge(
            "packhorse_responses_kept_bytes", "Memory of the responses that are kept in it."
        )
        self.responses_dropped = make.counter(
            "packhorse_responses_dropped_total",
            "Responses that memory does not keep, by reason: evicted (older than others, when it "
            "is full) or too_large.",
            ["reason"],
        )
        self.responses_in_background = make.gauge(
            "packhorse_responses_in_background",
            "Responses with `background` that wait or are generated.",
        )
        # Every value that labels of a closed set can have.
        self.closed: dict[Counter, tuple[str, ...]] = {
            self.responses_dropped: ("evicted", "too_large"),
            self.batch_lines: ("answered", "failed", "postponed", "preempted"),
            self.auth_failures: (
                "missing", "malformed", "unknown", "scope", "remote", "forwarded", "host",
                "origin",
            ),
            self.connections_cut: ("full", "made_room", "slow", "large", "pipelined", "unread"),
        }  # fmt: skip
        _begin(self.closed)

    def watch_machine(self) -> None:
        """Add what processes, machine and GPUs do, read at each scrape."""
        self.registry.register(Machine())
        self.registry.register(Gpus())


class ModelMetrics:
    """Of one served model: its requests, engine, adapters, routing and results."""

    def __init__(self, model: str = "") -> None:
        """`model` is the served name, the value of the label."""
        self.model = model
        self.registry = CollectorRegistry()
        make = _Make(self.registry)
        self.requests = make.counter(
            "packhorse_requests_total",
            "Requests, by how they ended: ok, or the kind of error.",
            ["outcome"],
        )
        self.in_flight = make.gauge(
            "packhorse_requests_in_flight",
            "Requests from their arrival to their last token, the cache's among them.",
        )
        self.tokens = make.counter(
            "packhorse_tokens_total",
            "Tokens read (prompt) and written (completion).",
            ["direction"],
        )
        self.time_to_first_token_seconds = make.histogram(
            "packhorse_time_to_first_token_seconds",
            "Streams: from the request's arrival to its first chunk.",
            buckets=_SECONDS,
        )
        self.request_seconds = make.histogram(
            "packhorse_request_seconds",
            "From the request's arrival to its end, however it ended.",
            buckets=_SECONDS,
        )
        self.frontend_seconds = make.histogram(
            "packhorse_frontend_seconds",
            "From the request's arrival to the engine getting it: routing, rendering, the cache's "
            "look-up, admission, and its turn on the adapter.",
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 30),
        )
        self.admission_refusals = make.counter(
            "packhorse_admission_refusals_total",
            "Requests refused at once, by the limit that was met: in_flight, running, "
            "queued_tokens, key_concurrency, key_tokens, key_requests, adapter_waiting, "
            "adapters_in_use, engine_queue or body_bytes.",
            ["reason"],
        )
        self.ignored_fields = make.counter(
            "packhorse_ignored_fields_total",
            "Fields of requests that had no effect, by name; `other` for those that no known "
            "client sends.",
            ["field"],
        )
        self.waiting = make.gauge(
            "packhorse_requests_waiting",
            "Admitted requests of which nothing has been answered yet.",
        )
        self.queued_tokens = make.gauge("packhorse_queued_tokens", "Prompt tokens of these.")
        self.engine_failures = make.counter(
            "packhorse_engine_failures_total",
            "Engines that were lost, by how: died, hung, or not_built (a rebuild that failed).",
            ["reason"],
        )
        self.engine_up = make.gauge(
            "packhorse_engine_up", "1 while there is an engine, 0 while one is built."
        )
        self.replays = make.counter(
            "packhorse_requests_replayed_total",
            "Requests handed to a new engine because theirs died before they had streamed "
            "anything.",
        )
        self.poison = make.counter(
            "packhorse_requests_poison_total", "Requests found to end the engine; refused."
        )
        self.poison_refused = make.counter(
            "packhorse_requests_poison_refused_total",
            "Requests refused because they equal one that was found before; no engine had them.",
        )
        self.waiting_for_engine = make.gauge(
            "packhorse_requests_waiting_for_engine",
            "Requests that wait for a new engine, or for their turn on it.",
        )
        self.adapters = make.gauge("packhorse_adapters", "Adapters that are registered.")
        self.adapters_resident = make.gauge(
            "packhorse_adapters_resident", "Adapters that the engine holds."
        )
        self.active_loras_per_step = make.histogram(
            "packhorse_active_loras_per_step",
            "Adapters with running requests, of each step of the engine; some of them may stand "
            "still.",
            buckets=(0, 1, 2, 3, 4, 8, 16, 32),
        )
        self.adapter_waiting = make.gauge(
            "packhorse_adapter_requests_waiting",
            "Requests that wait for their turn on an adapter.",
            ["adapter"],
        )
        self.adapter_folder_doubts = make.counter(
            "packhorse_adapter_folder_doubts_total",
            "Looks at the watched folder that missed adapters and removed none, by reason: away "
            "(it cannot be read), empty, changed (another folder or mount is in its place), or "
            "unreadable (an adapter is listed, and its files cannot be had).",
            ["reason"],
        )
        self.adapter_failures = make.counter(
            "packhorse_adapter_failures_total",
            "Adapters, or new versions of one, that were refused or could not be loaded.",
        )
        self.adapter_evictions = make.counter(
            "packhorse_adapter_evictions_total", "Adapters unloaded to make room for others."
        )
        self.adapter_load_seconds = make.histogram(
            "packhorse_adapter_load_seconds",
            "Loading an adapter into the engine.",
            buckets=_SECONDS,
        )
        self.routes = make.counter(
            "packhorse_routes_total",
            "Requests by where they went and which stage said so: explicit (the request's own "
            "name), rules, learned, or default. The adapter is empty for the base.",
            ["adapter", "stage"],
        )
        self.route_seconds = make.histogram(
            "packhorse_route_seconds",
            "Choosing an adapter by a request's text.",
            buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1),
        )
        self.route_generation = make.gauge(
            "packhorse_route_generation", "Number of the routing in use."
        )
        self.route_refusals = make.counter(
            "packhorse_route_reloads_refused_total",
            "New routes that did worse in their self-test than they may; the old ones stay.",
        )
        self.cache_lookups = make.counter(
            "packhorse_cache_lookups_total",
            "Look-ups of results, by tier (memory, store) and outcome: hit, miss, old (older than "
            "the request takes), damaged, or failed (no answer from the store).",
            ["tier", "outcome"],
        )
        self.cache_stores = make.counter(
            "packhorse_cache_results_total",
            "Finished results, by outcome: kept, too_large, or failed (the store did not take it).",
            ["outcome"],
        )
        self.cache_coalesced = make.counter(
            "packhorse_cache_coalesced_total", "Requests that joined an equal one's generation."
        )
        self.cache_saved_tokens = make.counter(
            "packhorse_cache_saved_tokens_total",
            "Tokens answered that the engine did not have to write.",
        )
        self.cache_bytes = make.gauge(
            "packhorse_cache_memory_bytes", "What the results in memory take."
        )
        self.cache_entries = make.gauge("packhorse_cache_memory_entries", "Results in memory.")
        self.cache_evictions = make.counter(
            "packhorse_cache_evictions_total",
            "Results dropped from memory to make room for others.",
        )
        self.cache_flushes = make.counter(
            "packhorse_cache_flushes_total", "Flushes asked of this replica."
        )
        self.cache_store_up = make.gauge(
            "packhorse_cache_store_up",
            "1 while the shared store is used, 0 while the breaker is open.",
        )
        self.cache_store_failures = make.counter(
            "packhorse_cache_store_failures_total",
            "Calls to the shared store that failed, by reason: timeout, refused, or error.",
            ["reason"],
        )
        # Every value that labels of a closed set can have.
        self.closed: dict[Counter, tuple[str, ...]] = {
            self.requests: ("ok", *map(str, ErrorKind)),
            self.tokens: ("prompt", "completion"),
            self.engine_failures: ("died", "hung", "not_built"),
            self.adapter_folder_doubts: ("away", "empty", "changed", "unreadable"),
            self.admission_refusals: (
                "in_flight", "running", "queued_tokens", "key_concurrency", "key_tokens",
                "key_requests", "adapter_waiting", "adapters_in_use", "engine_queue", "body_bytes",
            ),
            self.ignored_fields: ("other", *sorted(IGNORED_NAMES)),
            self.cache_stores: ("kept", "too_large", "failed"),
            self.cache_store_failures: ("timeout", "refused", "error"),
        }  # fmt: skip
        _begin(self.closed)
        # Looked up once, and not with every request.
        self.requests_by_outcome = {
            outcome: self.requests.labels(outcome) for outcome in self.closed[self.requests]
        }
        self.prompt_tokens = self.tokens.labels("prompt")
        self.completion_tokens = self.tokens.labels("completion")
        self.by_adapter: tuple[Counter | Gauge, ...] = (self.adapter_waiting, self.routes)
        """What has series by adapter."""

    def forget_adapter(self, name: str) -> None:
        """Take the series of an adapter that is gone from every metric that has them. Not before
        its last request has ended: that one would bring them back.
        """
        for metric in self.by_adapter:
            metric.remove_by_labels({"adapter": name})

    def requests_waiting_for_engine(self) -> float:
        """How many requests wait for an engine, or for their turn on it."""
        families = self.waiting_for_engine.collect()
        return sum(sample.value for family in families for sample in family.samples)

    def adapters_waiting(self) -> dict[str, int]:
        """Adapters that requests wait for, and how many do."""
        samples = [sample for family in self.adapter_waiting.collect() for sample in family.samples]
        return {
            sample.labels["adapter"]: int(sample.value) for sample in samples if sample.value > 0
        }


class Exposition(Collector):
    """One server's page: its own metrics, those of its models with the label `model`, and what
    Python, and vLLM for these models, have in the global registry.
    """

    def __init__(self, server: ServerMetrics, models: Callable[[], Iterable[ModelMetrics]]) -> None:
        self._server = server
        self._models = models

    def collect(self) -> Iterator[Metric]:
        yield from self._server.registry.collect()
        families: dict[str, Metric] = {}
        models = list(self._models())
        for model in models:
            for family in model.registry.collect():
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                merged.samples += [
                    sample._replace(labels={"model": model.model, **sample.labels})
                    for sample in family.samples
                ]
        for name, family in families.items():
            yield family
            if old := RENAMED.get(name):
                yield _renamed(family, old)
        names = {None, *(model.model for model in models)}
        for family in REGISTRY.collect():
            if family.name.startswith("vllm:"):  # of other servers in this process, too
                family.samples = [
                    sample for sample in family.samples if sample.labels.get("model_name") in names
                ]
            yield family

    def text(self) -> tuple[bytes, str]:
        """The page in Prometheus' text format, and its content type."""
        page: Any = self  # it asks for a registry, and only collects
        return prometheus_client.generate_latest(page), prometheus_client.CONTENT_TYPE_LATEST


def _renamed(family: Metric, old: str) -> Metric:
    """The same series under the name that they had."""
    text = f"DEPRECATED: renamed to {family.name}; goes in the next release."
    same = Metric(old, text, family.type)
    same.samples = [
        sample._replace(name=old + sample.name.removeprefix(family.name))
        for sample in family.samples
    ]
    return same
