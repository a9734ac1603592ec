"""The symmetric contrastive loss over a whole batch, exact, without ever holding the matrix of all similarities."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ml.parallel.manual import manual
from ml.weights.shards import mesh_axes

# Instead of the similarity with a row that does not count: finite, so that its softmax is 0 and not NaN.
_NEVER = -1e30
# A similarity is multiplied by up to 100: it would lose its first decimal in the bfloat16 passes of a TPU's default.
_EXACT = jax.lax.Precision.HIGHEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def contrastive_loss(
    images: Float[Array, "batch features"],
    texts: Float[Array, "batch features"],
    log_scale: Float[Array, ""],
    mask: Float[Array, "batch"],
    block: int = 0,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""]]]:
    """Sums over pairs the cross-entropy of finding the text among all texts, and the image among all images, halved.

    With ``A = exp(log_scale) images texts^T``: ``sum_i -(log softmax(A_i:)_i + log softmax(A_:i)_i) / 2`` (Radford et
    al. 2021, figure 3; Pham et al. 2021 (BASIC), eq. 1). Every pair of the batch is a negative of every other, on
    whatever device it lies.

    The matrix is made ``block`` rows of a device at a time, once for the normalizers of its rows and columns and once
    more for the gradient, which is computed in the backward pass. Beside embeddings and their gradients a device holds
    ``O(block * batch)``. Each gathers the texts of all others once a pass; gradients of texts are reduced and cut.

    Args:
      images, texts: embeddings of pairs, normed by the caller, cut along the same mesh axes or not at all.
      log_scale: logarithm of one over the temperature.
      mask: 1 for pairs that count, 0 for padding, which is nobody's negative.
      block: rows of the matrix at a time; 0: all of a device's.

    Returns:
      The loss in nats, and how many images are most similar to their own text, and texts to their own image; of these
      two there is no gradient.
    """
    return _forward(images, texts, log_scale, mask, block)[0]


def _forward(images, texts, log_scale, mask, block):
    axes, pairs, vector = _placement(images)

    def body(images, texts, log_scale, mask):
        matrix = _Matrix(texts, log_scale, mask, axes)

        def add(columns, rows):
            logits = matrix.logits(rows)
            top, total = columns
            new = jnp.maximum(top, logits.max(axis=0))
            total = total * jnp.exp(top - new) + jnp.exp(logits - new).sum(axis=0)
            return (new, total), (jax.nn.logsumexp(logits, axis=1), logits.max(axis=1), matrix.own(logits, rows))

        start = jnp.full(matrix.size, _NEVER), jnp.zeros(matrix.size)
        (top, total), of_rows = jax.lax.scan(add, start, matrix.blocks(block, images, mask))
        row_lse, row_top, own = (x.reshape(-1)[: len(mask)] for x in of_rows)
        most = jax.lax.pmax(top, axes) if axes else top
        total = _summed(total * jnp.exp(top - most), axes)
        column_lse, column_top = matrix.local(most + jnp.log(total)), matrix.local(most)
        sums = ((row_lse + column_lse) / 2 - own, own >= row_top, own >= column_top)
        return *(_summed(jnp.sum(x * mask), axes) for x in sums), row_lse, column_lse

    whole = PartitionSpec()
    mapped = manual(body, (pairs, pairs, whole, vector), (whole, whole, whole, vector, vector), check_vma=False)
    loss, image_hits, text_hits, row_lse, column_lse = mapped(images, texts, log_scale, mask)
    return (loss, (image_hits, text_hits)), (images, texts, log_scale, mask, row_lse, column_lse)


def _backward(block, saved, cotangents):
    axes, pairs, vector = _placement(saved[0])

    def body(images, texts, log_scale, mask, row_lse, column_lse, scale):
        matrix = _Matrix(texts, log_scale, mask, axes)
        column_lse = _gathered(column_lse, axes)

        def add(sums, rows):
            x, counted, index, lse = rows
            logits = matrix.logits((x, counted, index))
            of_rows = jnp.exp(logits - lse[:, None]) * counted[:, None]
            of_columns = jnp.exp(logits - column_lse) * matrix.counted
            gradient = (of_rows + of_columns) / 2 - matrix.is_own(index) * counted[:, None]
            of_x = jnp.einsum("rc,cd->rd", gradient, matrix.texts, precision=_EXACT)
            of_texts = jnp.einsum("rc,rd->cd", gradient, x, precision=_EXACT)
            # What does not count has a gradient of 0 and a logit that is finite.
            return jax.tree.map(jnp.add, sums, (of_texts, jnp.sum(gradient * logits))), of_x

        start = jnp.zeros_like(matrix.texts), jnp.zeros(())
        blocks = matrix.blocks(block, images, mask, row_lse)
        (of_texts, of_scale), of_images = jax.lax.scan(add, start, blocks)
        of_images = of_images.reshape(-1, images.shape[1])[: len(images)]
        for axis in axes:
            of_texts = jax.lax.psum_scatter(of_texts, axis, scatter_dimension=0, tiled=True)
        factor = scale * matrix.scale
        of_images, of_texts = ((factor * g).astype(x.dtype) for g, x in ((of_images, images), (of_texts, texts)))
        return of_images, of_texts, (scale * _summed(of_scale, axes)).astype(log_scale.dtype)

    whole = PartitionSpec()
    in_specs = (pairs, pairs, whole, vector, vector, vector, whole)
    mapped = manual(body, in_specs, (pairs, pairs, whole), check_vma=False)
    return *mapped(*saved, cotangents[0]), None


contrastive_loss.defvjp(_forward, _backward)


class _Matrix:
    """The similarities of a device's images with all texts, some rows at a time."""

    def __init__(self, texts: jax.Array, log_scale: jax.Array, mask: jax.Array, axes: tuple[str, ...]):
        self.scale = jnp.exp(log_scale.astype(jnp.float32))
        self.texts = _gathered(texts.astype(jnp.float32), axes)
        self.counted = _gathered(mask, axes)
        self.size, self.part = len(self.counted), len(mask)
        self.first = jax.lax.axis_index(axes) * self.part if axes else 0

    def blocks(self, block: int, images: jax.Array, mask: jax.Array, *vectors: jax.Array) -> tuple[jax.Array, ...]:
        """Images, which of them count, the columns of their own texts, and ``vectors``: ``[blocks, rows, ...]``.

        The last block is filled up with rows that do not count.
        """
        size = min(block or self.part, self.part)
        count = math.ceil(self.part / size)

        def cut(x: jax.Array) -> jax.Array:
            padded = jnp.pad(x, [(0, count * size - self.part), *[(0, 0)] * (x.ndim - 1)])
            return padded.reshape(count, size, *x.shape[1:])

        index = self.first + jnp.arange(self.part)
        return tuple(map(cut, (images.astype(jnp.float32), mask, index, *vectors)))

    def logits(self, rows: Any) -> jax.Array:
        """The similarities of some rows, over the temperature."""
        x, counted, _ = rows
        similarities = jnp.einsum("rd,cd->rc", x, self.texts, precision=_EXACT)
        return jnp.where(counted[:, None] * self.counted > 0, self.scale * similarities, _NEVER)

    def is_own(self, index: jax.Array) -> jax.Array:
        """Where a row meets its own column."""
        return index[:, None] == jnp.arange(self.size)

    def own(self, logits: jax.Array, rows: Any) -> jax.Array:
        """Each row's entry in its own column."""
        return jnp.where(self.is_own(rows[2]), logits, 0).sum(axis=1)

    def local(self, columns: jax.Array) -> jax.Array:
        """Of something that each column has, the device's own part."""
        return jax.lax.dynamic_slice_in_dim(columns, self.first, self.part)


def _placement(images: jax.Array) -> tuple[tuple[str, ...], PartitionSpec, PartitionSpec]:
    """The mesh axes that cut the pairs, and the placement of what has a row, or a number, for each."""
    sharding = jax.typeof(images).sharding
    if sharding.mesh.empty:
        return (), PartitionSpec(), PartitionSpec()
    rows = sharding.spec.partitions[0]
    return mesh_axes(rows), PartitionSpec(rows, None), PartitionSpec(rows)


def _gathered(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    for axis in reversed(axes):  # along one dimension of a TPU's torus after another
        x = jax.lax.all_gather(x, axis, tiled=True)
    return x


def _summed(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x
