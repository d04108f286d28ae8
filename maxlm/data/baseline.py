"""What counting reaches: n-gram models of a store's tokens, in bits per byte, to hold a language model's loss against.

Reference:
    Interpolated modified Kneser-Ney smoothing: Chen and Goodman, "An Empirical Study of Smoothing Techniques for
    Language Modeling", 1998, section 3 and equations 23 to 26.
"""

from dataclasses import dataclass

import numpy as np

from maxlm.data.sources import DataError
from maxlm.data.store import TokenStore


def ngram_bits_per_byte(
    store: TokenStore, max_train_tokens: int = 20_000_000, max_heldout_tokens: int = 2_000_000
) -> dict[str, float]:
    """Fits a unigram and a trigram model on the training split and scores the held-out split.

    As in training, the token after an end-of-document token is not predicted. Bits per predicted token are multiplied
    by the held-out split's tokens per byte.

    Args:
        store: any complete store.
        max_train_tokens: tokens to count, from the start of the split; about 80 bytes of memory each.
        max_heldout_tokens: tokens to score.

    Returns:
        dict(unigram, trigram), bits per byte of held-out text: add-one smoothed token frequencies, and an
        interpolated modified Kneser-Ney trigram model.

    Raises:
        DataError: a split has fewer than three tokens.
    """
    train_N = _tokens(store, "train", max_train_tokens)
    test_N = _tokens(store, "heldout", max_heldout_tokens)
    if min(len(train_N), len(test_N)) < 3:
        raise DataError(f"store {store.path} has too few training or held-out tokens for an n-gram model")
    tokens_per_byte = store.num_tokens("heldout") / store.num_bytes("heldout")
    predicted = test_N[:-1] != store.eos_id
    counts_V = np.bincount(train_N, minlength=store.vocab_size) + 1
    unigram = -np.log2(counts_V / counts_V.sum())[test_N[1:]]
    trigram = -np.log2(_Trigram(train_N, store).probabilities(test_N))
    return {
        "unigram": float(unigram[predicted].mean() * tokens_per_byte),
        "trigram": float(trigram[predicted].mean() * tokens_per_byte),
    }


class _Trigram:
    """P(c | a b) with continuation counts and back-off, as sorted arrays of the n-grams seen.

    A pair (a, b) is the number a V + b, a triple (a, b, c) is (index of its pair) V + c: 64 bits hold both for any
    vocabulary that 32-bit token ids can name.
    """

    def __init__(self, tokens_N: np.ndarray, store: TokenStore):
        self._vocab_size = np.int64(store.vocab_size)
        # A document's first prediction sees nothing before its first token, hence the padding.
        self._eos_id = store.eos_id
        pairs_N = self._pairs(tokens_N)
        self._pair_keys = np.unique(pairs_N)
        histories_N = np.searchsorted(self._pair_keys, pairs_N[:-1])
        triples, counts = np.unique(histories_N * self._vocab_size + tokens_N[1:], return_counts=True)
        self._top = _Level.fit(triples, counts, triples // self._vocab_size, len(self._pair_keys))
        # Lower orders count in how many contexts an n-gram was seen, not how often (Kneser-Ney).
        inner = self._pair_keys[triples // self._vocab_size] % self._vocab_size
        pairs, contexts = np.unique(inner * self._vocab_size + triples % self._vocab_size, return_counts=True)
        self._middle = _Level.fit(pairs, contexts, pairs // self._vocab_size, int(self._vocab_size))
        singles, contexts = np.unique(pairs % self._vocab_size, return_counts=True)
        self._bottom = _Level.fit(singles, contexts, np.zeros_like(singles), 1)

    def probabilities(self, tokens_N: np.ndarray) -> np.ndarray:
        """P of tokens_N[1:], each given the two tokens before it; float64 [N - 1]."""
        pairs_N = self._pairs(tokens_N)[:-1]
        last, target = tokens_N[:-1].astype(np.int64), tokens_N[1:].astype(np.int64)
        p = self._bottom.interpolate(target, np.zeros_like(target), np.float64(1 / self._vocab_size))
        p = self._middle.interpolate(last * self._vocab_size + target, last, p)
        found = np.searchsorted(self._pair_keys, pairs_N).clip(max=len(self._pair_keys) - 1)
        known = self._pair_keys[found] == pairs_N
        return np.where(known, self._top.interpolate(found * self._vocab_size + target, found, p), p)

    def _pairs(self, tokens_N: np.ndarray) -> np.ndarray:
        tokens = np.concatenate([[self._eos_id], tokens_N]).astype(np.int64)
        return tokens[:-1] * self._vocab_size + tokens[1:]


@dataclass
class _Level:
    """One order of the model: discounted counts of its n-grams, and totals and back-off weights of their contexts."""

    keys: np.ndarray
    discounted: np.ndarray
    totals: np.ndarray
    backoff: np.ndarray

    @classmethod
    def fit(cls, keys: np.ndarray, counts: np.ndarray, contexts: np.ndarray, num_contexts: int) -> "_Level":
        """Fits n-grams with sorted keys, their counts and the index of each one's context, all [num_ngrams]."""
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        totals = np.bincount(contexts, counts, num_contexts)
        # What the discounts took is what the context gives to the lower order.
        taken = np.bincount(contexts, discounts, num_contexts)
        backoff = np.divide(taken, totals, out=np.ones(num_contexts), where=totals > 0)
        return cls(keys, counts - discounts, np.maximum(totals, 1), backoff)

    def interpolate(self, keys: np.ndarray, contexts: np.ndarray, lower: np.ndarray | np.float64) -> np.ndarray:
        """P of n-grams given by keys and contexts [N], with the lower order's probabilities [N]."""
        found = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        counted = np.where(self.keys[found] == keys, self.discounted[found], 0.0)
        return counted / self.totals[contexts] + self.backoff[contexts] * lower


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken from n-grams seen 0, 1, 2 and 3 or more times; float64 [4]."""
    n1, n2, n3, n4 = (float((counts == i).sum()) for i in (1, 2, 3, 4))
    if min(n1, n2, n3) == 0:  # Too little text to estimate them.
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    estimated = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    # A discount of zero would leave nothing for what was never seen.
    return np.clip(estimated, [0.0, 0.05, 0.05, 0.05], [0.0, 0.95, 1.95, 2.95])


def _tokens(store: TokenStore, split: str, limit: int) -> np.ndarray:
    return store.read(split, 0, min(limit, store.num_tokens(split))).astype(np.int64)  # pyrefly: ignore
