"""packhorse.v1.Admin: a method per call, each on the same Admin as HTTP's endpoints."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from packhorse.serve.adapters.base import AdapterCard
from packhorse.serve.api.admin import Admin
from packhorse.serve.rpc.calls import Call
from packhorse.serve.rpc.pb import admin_pb2 as pb


class Operators:
    """The public methods are the service's, in snake case; server.py finds them by name."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin

    async def list_adapters(self, call: Call[pb.ListAdaptersRequest]) -> pb.ListAdaptersResponse:
        return pb.ListAdaptersResponse(adapters=map(_adapter, self._admin.adapters()))

    async def get_adapter(self, call: Call[pb.GetAdapterRequest]) -> pb.Adapter:
        return _adapter(self._admin.adapter(call.request.name))

    async def put_adapter(self, call: Call[pb.PutAdapterRequest]) -> pb.Adapter:
        request = call.request
        pinned = request.pinned if request.HasField("pinned") else None
        card = await self._admin.put_adapter(
            call.caller, request.name, request.path, replace=request.replace, pinned=pinned
        )
        return _adapter(card)

    async def pin_adapter(self, call: Call[pb.PinAdapterRequest]) -> pb.Adapter:
        request = call.request
        return _adapter(
            await self._admin.pin_adapter(call.caller, request.name, pinned=request.pinned)
        )

    async def remove_adapter(self, call: Call[pb.RemoveAdapterRequest]) -> pb.RemoveAdapterResponse:
        await self._admin.remove_adapter(call.caller, call.request.name)
        return pb.RemoveAdapterResponse()

    async def list_routings(self, call: Call[pb.ListRoutingsRequest]) -> pb.ListRoutingsResponse:
        return pb.ListRoutingsResponse(routings=map(_routing, self._admin.routes()))

    async def reload_routes(self, call: Call[pb.ReloadRoutesRequest]) -> pb.ReloadRoutesResponse:
        outcome = await self._admin.reload_routes(call.caller)
        return pb.ReloadRoutesResponse(
            accepted=outcome["accepted"],
            reasons=outcome["reasons"],
            generation=_routing(outcome["generation"]),
        )

    async def roll_back_routes(self, call: Call[pb.RollBackRoutesRequest]) -> pb.Routing:
        return _routing(self._admin.roll_back_routes(call.caller))

    async def flush_cache(self, call: Call[pb.FlushCacheRequest]) -> pb.FlushCacheResponse:
        request = call.request
        kind = request.WhichOneof("scope")
        scope = self._admin.cache_scope(**({kind: getattr(request, kind)} if kind else {}))
        if request.dry_run:
            amount = await self._admin.cache_amount(scope)
        else:
            amount = await self._admin.flush_cache(call.caller, scope)
        return pb.FlushCacheResponse(flushed=not request.dry_run, **asdict(amount))


def _adapter(card: AdapterCard) -> pb.Adapter:
    return pb.Adapter(**asdict(card))


def _routing(generation: dict[str, Any]) -> pb.Routing:
    return pb.Routing(
        number=generation["number"],
        created=generation["created"],
        rules=generation["rules"],
        report_json=json.dumps(generation["report"]),
    )
