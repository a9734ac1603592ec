"""The model cut for a pipeline: before, within and after its blocks, and the loss with it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from ml.models import AttentionStrategy, Transformer, head_params, logical_axes
from ml.parallel import Rules
from ml.train.config import TrainConfig
from ml.train.loss import chunked_loss
from ml.train.objective import Batch, Metrics

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
            valid=microbatch["segment_ids"] > 0,
            expert_counts=expert_counts,
            first=first,
            count=count,
            method="run_layers",
        )
        x, _, stats = outputs
        balance = stats.balance * microbatch["loss_mask"].sum()
        moe = self.model.config.moe
        objective = moe.aux_loss_weight * balance if moe else jnp.zeros_like(balance)
        return (x, objective), ({"objective": objective, "balance": balance}, stats.counts)

    def head(
        self, rest: PyTree, x: Float[Array, "rows length embed"], constants: PyTree, microbatch: Batch
    ) -> tuple[Float[Array, ""], Metrics]:
        """Objective and metrics of what the last block returned, summed over counted tokens."""
        params, config = self.wrap(rest, constants), self.config
        hidden: Any = self._ends.apply({"params": params}, x, method="normalize")
        objective, loss = chunked_loss(
            lambda head, hidden: self._ends.apply({"params": head}, hidden, method="logits"),  # type: ignore[arg-type,return-value]
            head_params(self.model.config, params),
            hidden,
            microbatch["targets"],
            microbatch["loss_mask"],
            config.z_loss,
            config.loss_chunk,
        )
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
        axes = _axes(_cut_vocab(self.rules.spec("vocab"), ("vocab",))[0])
        return self.model.config.vocab_size % int(np.prod([self.rules.mesh.shape[axis] for axis in axes])) == 0


def _cut_vocab(spec: PartitionSpec, names: tuple[str | None, ...]) -> PartitionSpec:
    """``spec`` of an array with these axes, and ``vocab`` is cut over ``stage`` as well."""
    entries = [(*_axes(entry), *(("stage",) if "stage" not in _axes(entry) else ())) for entry in spec]
    return PartitionSpec(*(new if n == "vocab" else old for new, old, n in zip(entries, spec, names, strict=True)))


def _axes(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)
