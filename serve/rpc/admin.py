"""packhorse.v1.Admin: the same calls on the operators' facade as HTTP's."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from packhorse.serve.adapters.base import AdapterCard
from packhorse.serve.api.admin import Admin
from packhorse.serve.rpc.calls import Call, Handler
from packhorse.serve.rpc.pb import admin_pb2 as pb


class Operators:
    """A method for each of Admin's."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin

    def handlers(self) -> dict[str, Handler]:
        return {
            "ListAdapters": self.list_adapters,
            "GetAdapter": self.get_adapter,
            "PutAdapter": self.put_adapter,
            "PinAdapter": self.pin_adapter,
            "RemoveAdapter": self.remove_adapter,
            "ListRoutings": self.list_routings,
            "ReloadRoutes": self.reload_routes,
            "RollBackRoutes": self.roll_back_routes,
            "FlushCache": self.flush_cache,
        }

    async def list_adapters(self, call: Call[pb.ListAdaptersRequest]) -> pb.ListAdaptersResponse:
        return pb.ListAdaptersResponse(adapters=map(_adapter, self._admin.adapters()))

    async def get_adapter(self, call: Call[pb.GetAdapterRequest]) -> pb.Adapter:
        return _adapter(self._admin.adapter(call.request.name))

    async def put_adapter(self, call: Call[pb.PutAdapterRequest]) -> pb.Adapter:
        asked = call.request
        pinned = asked.pinned if asked.HasField("pinned") else None
        card = await self._admin.put_adapter(
            call.caller, asked.name, asked.path, replace=asked.replace, pinned=pinned
        )
        return _adapter(card)

    async def pin_adapter(self, call: Call[pb.PinAdapterRequest]) -> pb.Adapter:
        asked = call.request
        return _adapter(await self._admin.pin_adapter(call.caller, asked.name, pinned=asked.pinned))

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
        asked = call.request
        kind = asked.WhichOneof("scope")
        scope = self._admin.cache_scope(**({kind: getattr(asked, kind)} if kind else {}))
        if asked.dry_run:
            found = await self._admin.cache_amount(scope)
        else:
            found = await self._admin.flush_cache(call.caller, scope)
        return pb.FlushCacheResponse(flushed=not asked.dry_run, **asdict(found))


def _adapter(card: AdapterCard) -> pb.Adapter:
    return pb.Adapter(**asdict(card))


def _routing(generation: dict[str, Any]) -> pb.Routing:
    return pb.Routing(
        number=generation["number"],
        created=generation["created"],
        rules=generation["rules"],
        report_json=json.dumps(generation["report"]),
    )
