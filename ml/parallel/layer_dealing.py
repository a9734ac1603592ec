"""Deals runs of layers round the stages of an interleaved pipeline, as cards are dealt, and collects them again.

The state holds layers in their own order, each stage a contiguous part, so that a checkpoint does not depend on the
pipeline. Stage ``s`` of ``p`` then owns the runs ``s v .. s v + v - 1`` of ``p v``, but computes the runs ``c p + s``.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import PyTree


def deal(layers: PyTree, stages: int, chunks: int) -> PyTree:
    """Orders the leading axis of every leaf ``[layers, ...]``, cut over ``stage``, so that each stage has its runs.

    In the shard on stage ``s`` of the result, the ``c``-th of ``chunks`` equal parts is run ``c stages + s``. Takes
    ``chunks`` rounds, in each of which every stage sends one run and receives one.
    """
    return _move(layers, stages, chunks, back=False)


def collect(layers: PyTree, stages: int, chunks: int) -> PyTree:
    """The inverse of `deal`."""
    return _move(layers, stages, chunks, back=True)


def _move(layers: PyTree, stages: int, chunks: int, back: bool) -> PyTree:
    if chunks == 1 or stages == 1:
        return layers
    rounds = _rounds(stages, chunks)

    def local(layers: Any) -> Any:
        stage = jax.lax.axis_index("stage")

        def one(leaf: jax.Array) -> jax.Array:
            size, out = leaf.shape[0] // chunks, leaf
            for moves in rounds:
                # (sender, its place, receiver, its place), one for each stage.
                moves = [(d, c, s, i) if back else (s, i, d, c) for s, i, d, c in moves]
                send = jnp.array([place for _, place, _, _ in sorted(moves)])[stage]
                keep = jnp.array([place for _, place in sorted((d, c) for _, _, d, c in moves)])[stage]
                run = jax.lax.dynamic_slice_in_dim(leaf, send * size, size)
                run = jax.lax.ppermute(run, "stage", [(s, d) for s, _, d, _ in moves])
                out = jax.lax.dynamic_update_slice_in_dim(out, run, keep * size, axis=0)
            return out

        return jax.tree.map(one, layers)

    spec = PartitionSpec("stage")
    return jax.shard_map(local, in_specs=(spec,), out_specs=spec, axis_names={"stage"}, check_vma=False)(layers)


def _rounds(stages: int, chunks: int) -> list[list[tuple[int, int, int, int]]]:
    """Rounds of moves ``(owner, place there, computing stage, place there)``: in each, a stage sends and receives once.

    Run ``k`` goes from ``k // v`` to ``k % p`` in round ``(k + k // lcm(v, p)) % v``. Of one owner these are ``v``
    consecutive runs within one block of ``lcm(v, p)``. Those of one receiver within a block are all ``k % v`` that are
    congruent to ``k % p`` modulo ``gcd(v, p)``, and the ``gcd(v, p)`` blocks shift these classes apart.
    """
    block = math.lcm(chunks, stages)
    rounds: list[list[tuple[int, int, int, int]]] = [[] for _ in range(chunks)]
    for run in range(stages * chunks):
        move = (run // chunks, run % chunks, run % stages, run // stages)
        rounds[(run + run // block) % chunks].append(move)
    return rounds
