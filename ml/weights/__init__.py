"""Typed parameter leaves and the few operations by which a model may touch them.

A leaf of the ``params`` tree is a plain array or a registered type (low-rank, quantized, sparse-delta...). Models never
multiply by a weight themselves: they call `dot`, `ragged_dot`, `take` or `materialize`, each of which dispatches on the
leaf's type. So a new way to store or adapt a weight is one file here that registers these operations; no model changes.
"""

from ml.weights.dense import dot, materialize, ragged_dot, take
from ml.weights.gathered import Gathered
from ml.weights.quantized import Int8, quantize

__all__ = ["Gathered", "Int8", "dot", "materialize", "quantize", "ragged_dot", "take"]
