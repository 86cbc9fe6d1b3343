from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "state", "digest", "rank", "pinned", "requests", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    digest: str
    rank: int
    pinned: bool
    requests: int
    reason: str
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., digest: _Optional[str] = ..., rank: _Optional[int] = ..., pinned: _Optional[bool] = ..., requests: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class PutAdapterRequest(_message.Message):
    __slots__ = ("name", "path", "replace", "pinned")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    replace: bool
    pinned: bool
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., replace: _Optional[bool] = ..., pinned: _Optional[bool] = ...) -> None: ...

class PinAdapterRequest(_message.Message):
    __slots__ = ("name", "pinned")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    pinned: bool
    def __init__(self, name: _Optional[str] = ..., pinned: _Optional[bool] = ...) -> None: ...

class RemoveAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RemoveAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRoutingsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRoutingsResponse(_message.Message):
    __slots__ = ("routings",)
    ROUTINGS_FIELD_NUMBER: _ClassVar[int]
    routings: _containers.RepeatedCompositeFieldContainer[Routing]
    def __init__(self, routings: _Optional[_Iterable[_Union[Routing, _Mapping]]] = ...) -> None: ...

class Routing(_message.Message):
    __slots__ = ("number", "created", "rules", "report_json")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    REPORT_JSON_FIELD_NUMBER: _ClassVar[int]
    number: int
    created: int
    rules: _containers.RepeatedScalarFieldContainer[str]
    report_json: str
    def __init__(self, number: _Optional[int] = ..., created: _Optional[int] = ..., rules: _Optional[_Iterable[str]] = ..., report_json: _Optional[str] = ...) -> None: ...

class ReloadRoutesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadRoutesResponse(_message.Message):
    __slots__ = ("accepted", "reasons", "generation")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reasons: _containers.RepeatedScalarFieldContainer[str]
    generation: Routing
    def __init__(self, accepted: _Optional[bool] = ..., reasons: _Optional[_Iterable[str]] = ..., generation: _Optional[_Union[Routing, _Mapping]] = ...) -> None: ...

class RollBackRoutesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FlushCacheRequest(_message.Message):
    __slots__ = ("model", "adapter", "tenant", "dry_run")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    model: str
    adapter: str
    tenant: str
    dry_run: bool
    def __init__(self, model: _Optional[str] = ..., adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class FlushCacheResponse(_message.Message):
    __slots__ = ("flushed", "memory_entries", "memory_bytes", "store_entries")
    FLUSHED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORE_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    flushed: bool
    memory_entries: int
    memory_bytes: int
    store_entries: int
    def __init__(self, flushed: _Optional[bool] = ..., memory_entries: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., store_entries: _Optional[int] = ...) -> None: ...
