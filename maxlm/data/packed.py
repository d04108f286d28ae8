"""Rows of a store of conversations: whole ones side by side, best fit, as a function of the store and the row length.

A conversation of n tokens takes n - 1 places of a row, an input and the token to be learned behind it at each, so that
none predicts another's first token. A longer one is cut at the end of the row; what is left unfilled is masked.

References:
    Ding et al., "Fewer Truncations Improve Language Modeling", 2024, https://arxiv.org/abs/2404.10830, section 3.
"""

import bisect
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from maxlm.data.store import Split, TokenStore
from maxlm.data.tokenizer import FIRST, LEARNED

SCAN_TOKENS = 1 << 22


class PackedRows:
    """The rows of one split; finding them reads the whole split once.

    Args:
        store: of conversations.
        split: "train" or "heldout".
        seq_len: T, tokens per row.

    Attributes:
        num_cut: conversations that are longer than a row.
        num_unlearned: those left out, since nothing within a row's length of them is learned.
    """

    def __init__(self, store: TokenStore, split: Split, seq_len: int):
        self._store, self._split, self._seq_len = store, split, seq_len
        starts_N, learned_M = _scan(store, split)
        lengths_N = np.diff(starts_N, append=store.num_tokens(split))
        places_N = np.minimum(lengths_N - 1, seq_len)
        # The first token of a conversation is never a target.
        following_N = np.searchsorted(learned_M, starts_N, "right")
        first_learned_N = np.append(learned_M, store.num_tokens(split))[following_N]
        kept_N = first_learned_N <= starts_N + places_N
        self.num_cut = int((lengths_N[kept_N] - 1 > seq_len).sum())
        self.num_unlearned = int((~kept_N).sum())
        self._starts_N, self._places_N = starts_N[kept_N], places_N[kept_N]
        self._rows = best_fit(self._places_N, seq_len)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Reads rows by number.

        Returns:
            dict(tokens, targets, segments, positions: int32 [B, T], mask: float32 [B, T]). Places left over are a
            segment of their own.
        """
        shape = (len(rows), self._seq_len)
        batch: dict[str, np.ndarray] = {
            key: np.zeros(shape, np.int32) for key in ("tokens", "targets", "segments", "positions")
        }
        batch["mask"] = np.zeros(shape, np.float32)
        for b, row in enumerate(rows):
            at = 0
            for segment, document in enumerate(self._rows[row], 1):
                length = int(self._places_N[document])
                raw = self._store.read_rows(self._split, [int(self._starts_N[document])], length + 1)[0]
                ids, part = (raw & (FIRST - 1)).astype(np.int32), np.s_[b, at : at + length]
                batch["tokens"][part], batch["targets"][part] = ids[:-1], ids[1:]
                batch["mask"][part] = raw[1:] >= LEARNED
                batch["segments"][part] = segment
                batch["positions"][part] = np.arange(length)
                at += length
            batch["segments"][b, at:] = len(self._rows[row]) + 1
            batch["positions"][b, at:] = np.arange(self._seq_len - at)
        return batch


def best_fit(sizes_N: np.ndarray, capacity: int) -> list[list[int]]:
    """Packs things into bins: the largest first, each into the fullest bin that has room.

    Args:
        sizes_N: int [N], 1 to capacity each.
        capacity: of a bin.

    Returns:
        The things of each bin, by index.
    """
    bins: list[list[int]] = []
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # those of which there are bins, in order
    for thing in np.argsort(-sizes_N, kind="stable").tolist():
        size = int(sizes_N[thing])
        found = bisect.bisect_left(rooms, size)
        if found < len(rooms):
            room = rooms[found]
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(found)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(thing)
        room -= size
        if room:
            if not by_room[room]:
                bisect.insort(rooms, room)
            by_room[room].append(chosen)
    return bins


def _scan(store: TokenStore, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Places of first tokens, and of learned ones, in order; int64 [num_conversations], [num_learned]."""
    firsts, learned = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    num_tokens = store.num_tokens(split)
    for start in range(0, num_tokens, SCAN_TOKENS):
        raw = store.read_rows(split, [start], min(SCAN_TOKENS, num_tokens - start))[0]
        firsts.append(np.flatnonzero(raw & FIRST) + start)
        learned.append(np.flatnonzero(raw >= LEARNED) + start)
    return np.concatenate(firsts), np.concatenate(learned)
