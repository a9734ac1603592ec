"""The model cut for a pipeline: before, within and after its blocks, and the loss with it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from ml.models import AttentionStrategy, Transformer, logical_axes
from ml.parallel import Rules
from ml.train.config import TrainConfig
from ml.train.objective import balance_loss, head_loss, valid_tokens
from ml.train.objective_class import Batch, Metrics
from ml.weights.shards import mesh_axes

# (what is differentiated, constants that belong to it) -> parameters of the model. Leaf by leaf, so that it holds for
# any part of the tree and any run of the layers.
Wrap = Callable[[PyTree, PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Three functions of one microbatch ``[rows, length]``; ``rest`` is the parameters without ``layers``.

    Before and after the blocks the vocabulary is cut over ``stage`` too, if it divides into so many shards; otherwise
    every stage does the same work there.

    Attributes:
      model: placed by ``rules``.
      config: what the loss depends on.
      rules: the layout.
      strategy: how to attend in a microbatch.
      wrap: makes parameters of what is differentiated and of constants.
    """

    model: Transformer
    config: TrainConfig
    rules: Rules
    strategy: Callable[[Batch], AttentionStrategy]
    wrap: Wrap

    def embed(self, rest: PyTree, constants: PyTree, microbatch: Batch) -> Float[Array, "rows length embed"]:
        """What the first block receives."""
        inputs: Any = (microbatch["tokens"], microbatch["positions"])
        out: Any = self._ends.apply({"params": self.wrap(rest, constants)}, *inputs, method="embed_tokens")
        return out

    def run_layers(
        self,
        layers: PyTree,
        x: Float[Array, "rows length embed"],
        constants: PyTree,
        microbatch: Batch,
        first: Int[Array, ""],
        count: int,
        expert_counts: Int[Array, "count experts"] | None,
    ) -> tuple[tuple[Float[Array, "rows length embed"], Float[Array, ""]], tuple[Metrics, Int[Array, "count experts"]]]:
        """Layers ``first .. first + count - 1``, which is what ``layers`` holds.

        Returns:
          (the residual stream, the layers' own part of the objective), and (metrics, how often each expert was chosen):
          all summed over counted tokens. ``expert_counts`` are those of the same step's earlier microbatches.
        """
        outputs: Any = self.model.apply(
            {"params": {"layers": self.wrap(layers, constants)}},
            x,
            self.strategy(microbatch),
            microbatch["positions"],
            valid=valid_tokens(microbatch),
            expert_counts=expert_counts,
            first=first,
            count=count,
            method="run_layers",
        )
        x, _, stats = outputs
        objective, balance = balance_loss(self.model, stats, microbatch)
        return (x, objective), ({"objective": objective, "balance": balance}, stats.counts)

    def head(
        self, rest: PyTree, x: Float[Array, "rows length embed"], constants: PyTree, microbatch: Batch
    ) -> tuple[Float[Array, ""], Metrics]:
        """Objective and metrics of what the last block returned, summed over counted tokens."""
        params = self.wrap(rest, constants)
        hidden: Any = self._ends.apply({"params": params}, x, method="normalize")
        objective, loss = head_loss(self._ends, self.config, params, hidden, microbatch)
        return objective, {"objective": objective, "loss": loss}

    def spread(self, rest: PyTree) -> PyTree:
        """Cuts the vocabulary of dense parameters over the stages: what `embed` and `head` are to be given."""
        if not self._vocab_divides:
            return rest
        axes = {name: names for name, names in logical_axes(self.model.config).items() if name in rest}

        def one(names: tuple[str, ...], leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array) or "vocab" not in names:
                return leaf
            return jax.reshard(leaf, _cut_vocab(jax.typeof(leaf).sharding.spec, names))

        return jax.tree.map(one, axes, rest, is_leaf=lambda x: isinstance(x, tuple))

    @functools.cached_property
    def _ends(self) -> Transformer:
        place = self.rules.spec
        if self._vocab_divides:
            return self.model.clone(place=lambda *axes: _cut_vocab(place(*axes), axes))
        return self.model

    @functools.cached_property
    def _vocab_divides(self) -> bool:
        axes = mesh_axes(_cut_vocab(self.rules.spec("vocab"), ("vocab",))[0])
        return self.model.config.vocab_size % int(np.prod([self.rules.mesh.shape[axis] for axis in axes])) == 0


def _cut_vocab(spec: PartitionSpec, names: tuple[str | None, ...]) -> PartitionSpec:
    """``spec`` of an array with these axes, and ``vocab`` is cut over ``stage`` as well."""
    entries = [(*mesh_axes(entry), *(("stage",) if "stage" not in mesh_axes(entry) else ())) for entry in spec]
    return PartitionSpec(*(new if n == "vocab" else old for new, old, n in zip(entries, spec, names, strict=True)))
