"""Schemas of the custom resources: no more than the fields that we use, so that a misspelt one is
an error. From the Prometheus operator's and KEDA's own definitions.
"""

from __future__ import annotations

from typing import Any


def fields(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": sorted(required),
        "additionalProperties": False,
    }


TEXT = {"type": "string", "minLength": 1}
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
SPAN = {"type": "string", "pattern": r"^(\d+(ms|[smhdwy]))+$"}
COUNT = {"type": "integer", "minimum": 0}
METADATA = fields({"name": TEXT, "namespace": TEXT}, {"labels": LABELS})
SCALING = fields(
    {
        "stabilizationWindowSeconds": {"type": "integer", "minimum": 0, "maximum": 3600},
        "policies": {
            "type": "array",
            "minItems": 1,
            "items": fields(
                {
                    "type": {"enum": ["Pods", "Percent"]},
                    "value": {"type": "integer", "minimum": 1},
                    "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800},
                }
            ),
        },
    },
    {"selectPolicy": {"enum": ["Max", "Min", "Disabled"]}},
)

SERVICE_MONITOR = fields(
    {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "ServiceMonitor"},
        "metadata": METADATA,
        "spec": fields(
            {
                "selector": fields({"matchLabels": LABELS}),
                "endpoints": {
                    "type": "array",
                    "minItems": 1,
                    "items": fields(
                        {
                            "port": TEXT,
                            "path": TEXT,
                            "authorization": fields(
                                {
                                    "type": {"const": "Bearer"},
                                    "credentials": fields({"name": TEXT, "key": TEXT}),
                                }
                            ),
                        },
                        {"interval": SPAN, "scrapeTimeout": SPAN, "scheme": TEXT},
                    ),
                },
            },
            {"jobLabel": TEXT},
        ),
    }
)

SCALED_OBJECT = fields(
    {
        "apiVersion": {"const": "keda.sh/v1alpha1"},
        "kind": {"const": "ScaledObject"},
        "metadata": METADATA,
        "spec": fields(
            {
                "scaleTargetRef": fields({"apiVersion": TEXT, "kind": TEXT, "name": TEXT}),
                "minReplicaCount": COUNT,
                "maxReplicaCount": {"type": "integer", "minimum": 1},
                "triggers": {
                    "type": "array",
                    "minItems": 1,
                    "items": fields(
                        {
                            "type": {"const": "prometheus"},
                            # All text, numbers too.
                            "metadata": fields(
                                {
                                    "serverAddress": {"type": "string", "pattern": "^https?://"},
                                    "query": TEXT,
                                    "threshold": {"type": "string", "pattern": r"^\d+(\.\d+)?$"},
                                }
                            ),
                        },
                        {"metricType": {"enum": ["AverageValue", "Value"]}},
                    ),
                },
            },
            {
                "pollingInterval": COUNT,
                "cooldownPeriod": COUNT,
                "advanced": fields(
                    {
                        "horizontalPodAutoscalerConfig": fields(
                            {"behavior": fields({}, {"scaleUp": SCALING, "scaleDown": SCALING})}
                        )
                    }
                ),
            },
        ),
    }
)

CUSTOM = {"ServiceMonitor": SERVICE_MONITOR, "ScaledObject": SCALED_OBJECT}
