"""Pairs of sentences with masked tokens (BERT, Devlin et al. 2019, section 3.1), drawn anew for each record and epoch.

The original cuts a document into rows while it draws; here records are cut once and hold both sentences of a pair. When
B is to be a random sentence instead, the record's own B goes unseen in that epoch, and another document's text is seen.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int, Int64

from ml.data.config import MaskedConfig
from ml.data.sentences import SPECIAL_TOKENS, SentenceStore

Batch = dict[str, np.ndarray]

# Shares of the tokens to predict that become [MASK] or a random token; the others stay as they are.
MASKED, RANDOM = 0.8, 0.1
# Redraws of a random record that turns out to be of the same document, as in the original.
_TRIES = 10


@dataclasses.dataclass(frozen=True)
class PairReader:
    """Reads numbered records of several stores into batches; a pure function of the numbers.

    Attributes:
      stores: of one length; together they are one long list of records.
      config: what is drawn.
      ids: of the special tokens ``cls``, ``sep``, ``mask`` and ``pad``.
      regular: ids of all tokens that are text, from which random ones are drawn.
      seed: of what is drawn; ``None``: numbers are of one epoch, the same in every pass (evaluation).
    """

    stores: Sequence[SentenceStore]
    config: MaskedConfig
    ids: Mapping[str, int]
    regular: Int64[np.ndarray, "tokens"]
    seed: int | None

    @property
    def records(self) -> int:
        """Records in all stores."""
        return sum(map(len, self.stores))

    def __call__(self, numbers: Int[np.ndarray, "batch"]) -> Batch:
        """The batch of these numbers, ``record + records * epoch``; without a seed, beyond the last there is padding.

        Returns:
          What `empty_pairs` describes, with ``batch`` rows.
        """
        batch = empty_pairs(len(numbers), self.stores[0].sequence_length, self.config)
        batch["tokens"][:] = self.ids["pad"]
        ends = np.cumsum([len(store) for store in self.stores])
        for place, number in enumerate(np.asarray(numbers).tolist()):
            if self.seed is not None or number < self.records:
                # Philox: a generator for each number, and no two of them alike.
                rng = np.random.Generator(np.random.Philox(key=[self.seed or 0, number]))
                owner = int(np.searchsorted(ends, number % self.records, side="right"))
                row = number % self.records - int(ends[owner]) + len(self.stores[owner])
                self._write(batch, place, self.stores[owner], row, rng)
        return batch

    def _write(self, batch: Batch, place: int, store: SentenceStore, row: int, rng: np.random.Generator) -> None:
        length = store.sequence_length
        (a, a_words), (b, b_words), random_next = draw_pair(store, row, self.config, rng)
        size = len(a) + len(b) + SPECIAL_TOKENS
        second = len(a) + 2
        tokens = np.empty(size, np.int64)
        tokens[0] = self.ids["cls"]
        tokens[1 : second - 1] = a
        tokens[second - 1] = tokens[-1] = self.ids["sep"]
        tokens[second:-1] = b
        text = np.r_[1 : second - 1, second : size - 1]
        words = np.concatenate([a_words, b_words])
        masked = text[choose(words, wanted(size, self.config), self.config.whole_words, rng)]
        batch["targets"][place, : len(masked)] = tokens[masked]
        batch["masked_positions"][place, : len(masked)] = masked
        batch["loss_mask"][place, : len(masked)] = 1.0
        tokens[masked] = corrupted(tokens[masked], self.ids["mask"], self.regular, rng)
        assert size <= length
        batch["tokens"][place, :size] = tokens
        batch["segment_ids"][place, :size] = 1
        batch["token_types"][place, second:size] = 1
        batch["next_sentence"][place] = random_next
        batch["row_mask"][place] = 1.0


def empty_pairs(rows: int, length: int, config: MaskedConfig) -> Batch:
    """A batch of padding, every array zero.

    Args:
      rows: ``batch``.
      length: ``L``.
      config: says how many predictions ``P`` there are in a row at most.

    Returns:
      int32 ``[batch, L]``: ``tokens``; ``segment_ids``, 1 where there is text; ``token_types``, 1 from B on. ``[batch,
      P]``: int32 ``masked_positions``, ascending, and ``targets``, the tokens that were there; float32 ``loss_mask``, 1
      for each that counts. ``[batch, 1]``: int32 ``next_sentence``, 1 where B is a random sentence; float32
      ``row_mask``, 1 but for rows of padding.
    """
    predictions = min(config.max_predictions, length)
    widths = {"tokens": length, "segment_ids": length, "token_types": length, "masked_positions": predictions}
    widths |= {"targets": predictions, "next_sentence": 1}
    batch: Batch = {name: np.zeros((rows, width), np.int32) for name, width in widths.items()}
    batch["loss_mask"] = np.zeros((rows, predictions), np.float32)
    batch["row_mask"] = np.zeros((rows, 1), np.float32)
    return batch


def draw_pair(store: SentenceStore, row: int, config: MaskedConfig, rng: np.random.Generator):
    """Two sentences of a record, or the first and a random one of another document.

    Returns:
      ``(tokens, begins of words)`` of A and of B, and whether B is random: in a record of one sentence it always is.
    """
    first, end, document_end = store.span(row)
    room = store.sequence_length - SPECIAL_TOKENS
    if rng.random() < config.short_fraction:
        room = int(rng.integers(2, room, endpoint=True))
    cut = int(rng.integers(first + 1, end)) if end - first > 1 else end
    a = store.read(first, cut)
    random_next = cut == end or bool(rng.random() < config.random_next)
    if random_next:
        # As long as the record's own B would be, so that lengths do not tell which it is.
        want = store.size(cut, end) or max(1, store.sequence_length - SPECIAL_TOKENS - len(a[0]))
        b = _random_sentences(store, document_end, want, rng)
    else:
        b = store.read(cut, end)
    return *truncated(a, b, room, rng), random_next


def _random_sentences(store: SentenceStore, own_document: int, want: int, rng: np.random.Generator):
    for _ in range(_TRIES):
        first, end, document_end = store.span(int(rng.integers(len(store))))
        if document_end != own_document:
            break
    start = int(rng.integers(first, end))
    stop = store.fitting(start, document_end, want)
    # Whole sentences, and as near to the length that is wanted as they come.
    if stop < document_end and store.size(start, stop + 1) - want < want - store.size(start, stop):
        stop += 1
    return store.read(start, max(start + 1, stop))


def truncated(a, b, room: int, rng: np.random.Generator):
    """Takes tokens off the ends of the longer of two sentences until both fit into ``room``, each side by chance."""
    excess = max(0, len(a[0]) + len(b[0]) - room)
    sizes = [len(a[0]), len(b[0])]
    longer = int(sizes[1] > sizes[0])
    alone = min(excess, abs(sizes[0] - sizes[1]))
    off = [(excess - alone) // 2] * 2
    off[longer] += alone + (excess - alone) % 2
    cut = []
    for (tokens, words), less in zip((a, b), off, strict=True):
        front = int(rng.binomial(less, 0.5)) if less else 0
        part = slice(front, len(tokens) - less + front)
        words = words[part].copy()
        words[:1] = True
        cut.append((tokens[part], words))
    return cut


def wanted(size: int, config: MaskedConfig) -> int:
    """How many tokens of a row of ``size`` tokens, special ones included, are predicted at most."""
    return min(config.max_predictions, max(1, round(size * config.mask_fraction)))


def choose(words: Bool[np.ndarray, "n"], count: int, whole_words: bool, rng: np.random.Generator) -> np.ndarray:
    """Which of ``n`` tokens to predict: ascending indices, ``count`` of them or, with whole words, as many as fit.

    Args:
      words: which tokens begin a word; the first does.
      count: at most so many.
      whole_words: take a word's tokens together; a word that does not fit any more is passed over.
      rng: of the choice.
    """
    count = min(count, len(words))
    if not whole_words:
        return np.sort(rng.choice(len(words), count, replace=False))
    starts = np.flatnonzero(words)
    sizes = np.diff(np.append(starts, len(words)))
    chosen: list[int] = []
    for word in rng.permutation(len(starts)).tolist():
        if len(chosen) + sizes[word] <= count:
            chosen += range(starts[word], starts[word] + sizes[word])
        if len(chosen) == count:
            break
    return np.sort(np.array(chosen, np.int64))


def corrupted(
    tokens: Int64[np.ndarray, "n"], mask_id: int, regular: Int64[np.ndarray, "tokens"], rng: np.random.Generator
) -> Int64[np.ndarray, "n"]:
    """What stands in the place of tokens to predict: 80% [MASK], 10% a random token, 10% the token itself."""
    fate = rng.random(len(tokens))
    random = regular[rng.integers(len(regular), size=len(tokens))]
    return np.where(fate < MASKED, mask_id, np.where(fate < MASKED + RANDOM, random, tokens))
