"""Finds exact and near duplicates among any number of texts in bounded memory, by sketches.

Near duplicates are found by MinHash with one permutation (Li, Owen, Zhang 2012) and optimal
densification (Shrivastava 2017): a text is the set of its shingles, and its sketch has the smallest
hash in each of 64 bins. The share of equal bins of two sketches estimates the Jaccard similarity of
the sets (standard deviation 0.05 at a similarity of 0.8). Bands of four bins are the keys to look
up similar earlier texts (Leskovec, Rajaraman, Ullman, ch. 3).
"""

import hashlib
import os
import re
import tempfile
import unicodedata
from collections.abc import Sequence

import numpy as np

BINS = 64
_BAND = 4
BANDS = BINS // _BAND
# Size of a shingle: characters of a text, tokens of a token sequence.
_CHARACTERS, _TOKENS = 5, 3
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
# Texts that are sketched at once: their shingles take 8 bytes per character.
_TEXTS = 512

# Place of temporary files; the system's if there is none.
Folder = str | os.PathLike[str] | None

_SPACE = re.compile(r"\s+")


def normalise(text: str) -> str:
    """Unicode form NFKC, case folded, white space collapsed; punctuation is kept."""
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def text_key(text: str) -> int:
    """64-bit hash of a text, the same in every process."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, element by element, on uint64."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def sequence_keys(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """
    A 64-bit hash of each of several sequences, which depends on their order.

    Args:
        ids (`np.ndarray`): Elements of all sequences, concatenated, integers.
        lengths (`np.ndarray`): Length of each sequence, (n,).

    Returns:
        `np.ndarray`: uint64, (n,).
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(ids), dtype=np.int64) - np.repeat(starts, lengths)
    seasoned = place.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hashes = mix(np.asarray(ids).astype(np.uint64) + seasoned)
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes, dtype=np.uint64)])
    return mix(total[starts + lengths] - total[starts] + lengths.astype(np.uint64))


def sketch_texts(texts: Sequence[str]) -> np.ndarray:
    """
    MinHash sketches of normalised texts, by shingles of 5 characters.

    Returns:
        `np.ndarray`: uint64, (len(texts), 64).
    """
    parts = [np.empty((0, BINS), np.uint64)]
    for start in range(0, len(texts), _TEXTS):
        some = texts[start : start + _TEXTS]
        joined = "".join(some).encode("utf-32-le", "surrogatepass")
        codes = np.frombuffer(joined, dtype="<u4").astype(np.uint64)
        parts.append(_sketch(codes, np.array([len(text) for text in some]), _CHARACTERS))
    return np.concatenate(parts)


def sketch_tokens(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """
    MinHash sketches of token sequences, by shingles of 3 tokens.

    Args:
        ids (`np.ndarray`): Tokens of all sequences, concatenated.
        lengths (`np.ndarray`): Length of each sequence, (n,).

    Returns:
        `np.ndarray`: uint64, (n, 64).
    """
    return _sketch(np.asarray(ids).astype(np.uint64) + np.uint64(1), np.asarray(lengths), _TOKENS)


def _sketch(codes: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    count, lengths = len(lengths), lengths.astype(np.int64)
    row = np.repeat(np.arange(count), lengths)
    # Zeros after each sequence: short sequences have shingles too, and no shingle crosses two.
    padded = np.zeros(len(codes) + width * (count + 1), np.uint64)
    place = np.arange(len(codes)) + width * row
    padded[place] = codes
    hashes = np.zeros(len(codes), np.uint64)
    for offset in range(width):
        factor = mix(np.array([offset + 1], np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(
            1
        )
        hashes += padded[place + offset] * factor
    hashes = mix(hashes)
    bins = (hashes >> np.uint64(58)).astype(np.int64)
    smallest = np.full(count * BINS, _EMPTY, np.uint64)
    np.minimum.at(smallest, row * BINS + bins, hashes)
    return _densify(smallest.reshape(count, BINS))


def _densify(sketches: np.ndarray) -> np.ndarray:
    """Fill each empty bin from a full one, chosen in the same way for every text."""
    empty = sketches == _EMPTY
    pending = np.flatnonzero(empty.any(axis=1) & ~empty.all(axis=1))
    original, bins, attempt = sketches.copy(), np.arange(BINS, dtype=np.uint64), 0
    while len(pending):
        attempt += 1
        drawn = (mix(bins + np.uint64(attempt * BINS)) % np.uint64(BINS)).astype(np.int64)
        found = original[np.ix_(pending, drawn)]
        fill = empty[pending] & (found != _EMPTY)
        kept = sketches[pending]
        kept[fill] = mix(found + np.uint64(attempt))[fill]
        sketches[pending] = kept
        empty[pending] &= ~fill
        pending = pending[empty[pending].any(axis=1)]
    return sketches


class KeyIndex:
    """
    Maps 64-bit keys to the index of the first item that had them.

    The newest keys are in a dictionary, older ones in sorted arrays, and large arrays in temporary
    files, so that memory is bounded.

    Args:
        folder (`str` or `Path`, *optional*): Folder of the temporary files.
        recent (`int`, *optional*): Most keys of the dictionary (about 100 bytes each).
        run (`int`, *optional*): Least keys (16 bytes each) of an array in a file.
    """

    def __init__(self, folder: Folder = None, recent: int = 1 << 18, run: int = 1 << 21):
        self._folder, self._limit, self._run = folder, recent, run
        self._recent: dict[int, int] = {}
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Indices of items that had the keys, or -1; int64 of the shape of `keys`."""
        flat = np.asarray(keys, np.uint64).ravel()
        found = np.full(len(flat), -1, np.int64)
        for known, numbers in self._runs:
            place = np.minimum(np.searchsorted(known, flat), len(known) - 1)
            hit = (known[place] == flat) & (found < 0)
            found[hit] = numbers[place[hit]]
        for index in np.flatnonzero(found < 0) if self._recent else ():
            found[index] = self._recent.get(int(flat[index]), -1)
        return found.reshape(np.shape(keys))

    def find_recent(self, key: int) -> int:
        """Index of an item added since the last [`~KeyIndex.settle`], or -1."""
        return self._recent.get(key, -1)

    def add(self, key: int, number: int) -> None:
        """Add a key, unless it is known."""
        self._recent.setdefault(key, number)

    def settle(self) -> None:
        """Move the newest keys into an array if there are many of them."""
        if len(self._recent) < self._limit:
            return
        count = len(self._recent)
        keys = np.fromiter(self._recent.keys(), np.uint64, count)
        numbers = np.fromiter(self._recent.values(), np.int64, count)
        self._recent = {}
        # Arrays of similar size are merged, so that there are few.
        while self._runs and len(self._runs[-1][0]) <= 2 * len(keys) < self._run:
            known, known_numbers = self._runs.pop()
            keys = np.concatenate([known, keys])
            numbers = np.concatenate([known_numbers, numbers])
        order = np.argsort(keys, kind="stable")
        keys, numbers = keys[order], numbers[order]
        if len(keys) >= self._run // 2:
            keys, numbers = (_to_file(values, self._folder) for values in (keys, numbers))
        self._runs.append((keys, numbers))


def _to_file(values: np.ndarray, folder: Folder) -> np.ndarray:
    # A file without a name is removed when the process ends, even if it is killed.
    with tempfile.TemporaryFile(dir=folder) as file:
        values.tofile(file)
        file.flush()
        return np.memmap(file, dtype=values.dtype, mode="r")


class NearDuplicates:
    """
    Finds an earlier item whose sketch is similar.

    Args:
        threshold (`float`): Least estimated Jaccard similarity, above 0 and at most 1.
        folder (`str` or `Path`, *optional*): Folder of the temporary files; 64 bytes per item for
            the sketches and 256 for the keys.

    Raises:
        ValueError: If the threshold is out of range.
    """

    def __init__(self, threshold: float, folder: Folder = None):
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"threshold is {threshold}; must be above 0 and at most 1")
        self._least = int(np.ceil(threshold * BINS - 1e-9))
        self._index = KeyIndex(folder)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed in close()
        self._unwritten: list[bytes] = []
        self.count: int = 0

    def find(self, sketches: np.ndarray) -> np.ndarray:
        """
        Indices of similar items among those added, or -1.

        Args:
            sketches (`np.ndarray`): uint64, (n, 64).

        Returns:
            `np.ndarray`: int64, (n,).
        """
        keys, prints = split(sketches)
        candidates = self._index.find(keys)
        similar = np.full(len(sketches), -1, np.int64)
        for row in np.flatnonzero((candidates >= 0).any(axis=1)):
            similar[row] = self._verify(candidates[row], prints[row])
        return similar

    def find_and_add(self, sketches: np.ndarray) -> np.ndarray:
        """
        As `find`, but also compares each item with those before it in `sketches`, and adds items
        without a similar one.

        Returns:
            `np.ndarray`: int64, (n,): index of a similar item or -1.
        """
        similar, first = self.find(sketches), self.count
        for row, keys, prints in zip(range(len(similar)), *split(sketches), strict=True):
            if similar[row] < 0:
                similar[row] = self.find_recent(keys, prints, first)
            if similar[row] < 0:
                self.add(keys, prints)
        self.settle()
        return similar

    def find_recent(self, keys: np.ndarray, prints: np.ndarray, first: int) -> int:
        """
        Index of a similar item among those added since the item `first`, or -1.

        Args:
            keys (`np.ndarray`): From [`split`], uint64 (16,).
            prints (`np.ndarray`): From [`split`], uint8 (64,).
            first (`int`): `count` when [`~NearDuplicates.find`] was asked about the earlier ones.
        """
        found = [self._index.find_recent(key) for key in keys.tolist()]
        found = [number for number in found if number >= first]
        return self._verify(np.array(found), prints) if found else -1

    def add(self, keys: np.ndarray, prints: np.ndarray) -> None:
        """Add an item with keys and prints as in `find_recent`."""
        for key in keys.tolist():
            self._index.add(key, self.count)
        self._unwritten.append(prints.tobytes())
        self.count += 1
        if len(self._unwritten) >= 4096:
            self._write()

    def settle(self) -> None:
        """Move the newest items to arrays and files, if there are many."""
        self._index.settle()

    def _verify(self, candidates: np.ndarray, prints: np.ndarray) -> int:
        self._write()
        for number in np.unique(candidates[candidates >= 0]).tolist():
            self._file.seek(number * BINS)
            stored = np.frombuffer(self._file.read(BINS), np.uint8)
            if int((stored == prints).sum()) >= self._least:
                return number
        return -1

    def _write(self) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(b"".join(self._unwritten))
        self._unwritten = []

    def close(self) -> None:
        """Remove the temporary file of the sketches."""
        self._file.close()


def split(sketches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split sketches into keys for look-up, uint64 (n, 16), and prints to compare, uint8 (n,
    64).
    """
    return _band_keys(sketches), _fingerprints(sketches)


def _band_keys(sketches: np.ndarray) -> np.ndarray:
    bands = sketches.reshape(len(sketches), BANDS, _BAND)
    keys = np.zeros(bands.shape[:2], np.uint64) + np.arange(BANDS, dtype=np.uint64)
    for part in range(_BAND):
        keys = mix(keys * np.uint64(31) + bands[:, :, part])
    return keys


def _fingerprints(sketches: np.ndarray) -> np.ndarray:
    # One byte per bin: different hashes agree in one of 256 cases.
    return (mix(sketches) & np.uint64(0xFF)).astype(np.uint8)
