"""Which documents share an n-gram of words with other texts: contamination of an evaluation by training data.

The rule of GPT-3 (Brown et al. 2020, section 4 and appendix C): a document is contaminated if one of its 13-grams of
words occurs in the training text, or the complete document where it is shorter. Words are in lower case and without
punctuation. 8-grams are the length of Llama 3's analysis (Dubey et al. 2024, section 5.1.4), and find shorter quotes.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np

SIZES = (13, 8)
# A complete document of fewer words occurs by chance, so it is never counted.
SHORTEST = 5
# Words that are looked up together, 8 bytes each.
CHUNK = 1 << 20
# Odd, so that n-grams which differ in one word have different hashes.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# The end of a text: no word has this hash but by chance of 2^-64, so no n-gram reaches over it.
END = np.uint64(0xD6E8FEB86659FD93)
PUNCTUATION = re.compile(r"[^\w\s]|_")
# Chinese and Japanese are written without spaces: every character counts as a word.
UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")


def words_of(text: str) -> list[str]:
    """The words of a text: lower case, punctuation removed, separated by white space."""
    return UNSPACED.sub(r" \1 ", PUNCTUATION.sub("", text.lower())).split()


class NgramIndex:
    """The n-grams of some documents, as 64-bit hashes, to be found in other texts.

    Memory: 24 bytes per n-gram of the documents, and some 50 MB while texts are read, however many these are.

    Args:
        documents: their texts.
        sizes: lengths of n-grams in words.
    """

    def __init__(self, documents: list[str], sizes: tuple[int, ...] = SIZES):
        self.sizes, self.count = sizes, len(documents)
        hashed = [_hashes(words_of(text)) for text in documents]
        self.lengths = np.array([len(each) for each in hashed])
        # By n-gram length: hashes, documents and the size that each counts for.
        entries: dict[int, list[tuple[np.ndarray, int, int]]] = {}
        for number, document in enumerate(hashed):
            for place, size in enumerate(sizes):
                length = min(size, len(document))
                if length >= SHORTEST:
                    entries.setdefault(length, []).append((_ngrams(document, length), number, place))
        self.tables = {length: _table(hashes) for length, hashes in sorted(entries.items())}

    @property
    def too_short(self) -> np.ndarray:
        """Which documents have fewer than SHORTEST words and are never counted, shape (documents,)."""
        return self.lengths < SHORTEST

    def found_in(self, texts: Iterable[str]) -> dict[int, np.ndarray]:
        """`{size: which documents share an n-gram with one of the texts}`, booleans of shape (documents,)."""
        seen = {length: np.zeros(len(table[0]), bool) for length, table in self.tables.items()}
        for chunk in _chunks(texts):
            for length, places in self._matches(chunk):
                seen[length][places] = True
        return self._documents(seen)

    def overlaps(self, texts: Iterable[str], size: int) -> bool:
        """Whether one of the texts shares an n-gram with a document: to leave a row out of training data."""
        return bool(self.found_in(texts)[size].any())

    def _matches(self, chunk: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(length, places in its table) of the n-grams of hashed words."""
        ngrams, before = chunk, 1
        for length, (hashes, *_) in self.tables.items():
            if len(chunk) < length:
                break
            # From the hashes of the next shorter n-grams, one word at a time.
            for step in range(before, length):
                ngrams = ngrams[:-1] * MULTIPLIER + chunk[step:]
            before = length
            places = np.searchsorted(hashes, ngrams)
            places[places == len(hashes)] = 0
            yield length, places[hashes[places] == ngrams]

    def _documents(self, seen: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        overlapping = np.zeros((len(self.sizes), self.count), bool)
        for length, (_, places, documents, sizes) in self.tables.items():
            hit = seen[length][places]
            overlapping[sizes[hit], documents[hit]] = True
        return dict(zip(self.sizes, overlapping, strict=True))


def _table(entries: list[tuple[np.ndarray, int, int]]) -> tuple[np.ndarray, ...]:
    """(distinct hashes in order, and per n-gram its place among them, its document and its size's place)."""
    counts = [len(hashes) for hashes, _, _ in entries]
    distinct, places = np.unique(np.concatenate([hashes for hashes, _, _ in entries]), return_inverse=True)
    documents, sizes = (np.repeat(np.array([entry[k] for entry in entries], np.int32), counts) for k in (1, 2))
    return distinct, places.astype(np.int32), documents, sizes


def _hashes(words: list[str]) -> np.ndarray:
    # Python's hash is 64 bits and differs between processes, so hashes are never stored.
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def _ngrams(words: np.ndarray, length: int) -> np.ndarray:
    """Hashes of all n-grams: a polynomial in the words' hashes, modulo 2^64."""
    result = words
    for step in range(1, length):
        result = result[:-1] * MULTIPLIER + words[step:]
    return result


def _chunks(texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The words' hashes of several texts together, an END after each."""
    parts, size = [], 0
    for text in texts:
        parts += [_hashes(words_of(text)), np.array([END])]
        size += len(parts[-2]) + 1
        if size >= CHUNK:
            yield np.concatenate(parts)
            parts, size = [], 0
    if parts:
        yield np.concatenate(parts)
