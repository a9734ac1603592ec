"""Mixture of experts: dropless top-k routing, experts spread over the mesh, and what keeps their load even."""

from ml.models.moe.balance import MoEStats, update_router_bias
from ml.models.moe.layer import MoE, check_experts
from ml.models.moe.routing import route

__all__ = ["MoE", "MoEStats", "check_experts", "route", "update_router_bias"]
