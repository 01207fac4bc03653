"""The tags that count, their numbers of images, and the words that mean them."""

import collections
import dataclasses
import json
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from big_vision_lite.messages import some

BUILD = "python tools/prepare_dataset.py tags"


def plain(word: str) -> str:
    """Returns a word as it is compared: "#Dog " and "dog" are one."""
    return unicodedata.normalize("NFC", word).strip().lstrip("#").casefold()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tags `names` [C], the images that have each, and {plain word: number of its tag}.

    `images` is the number of images that were counted. Raises ValueError for fewer than
    two tags: there would be nothing to tell apart.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    words: Mapping[str, int]
    images: int

    def __post_init__(self):
        if len(self.names) < 2:
            raise ValueError(
                f"a vocabulary of {len(self.names)} tags ({some(self.names)}) tells "
                "nothing apart; two or more are needed: use a smaller --min_count, or "
                "more images."
            )

    def ids(self, words: Iterable[str]) -> tuple[int, ...]:
        """Returns the numbers of the tags that words mean, each once; drops others."""
        found = (self.words.get(plain(word)) for word in words)
        return tuple(dict.fromkeys(tag for tag in found if tag is not None))

    def marginal(self) -> np.ndarray:
        """Returns the share of each tag among all tags of images, float64 [C]."""
        counts = np.asarray(self.counts, np.float64)
        return counts / counts.sum()

    def text(self) -> str:
        """Returns what a vocabulary file holds: JSON, one tag a line."""
        words: list[list[str]] = [[] for _ in self.names]
        for word, tag in self.words.items():
            words[tag].append(word)
        rows = [
            json.dumps({"tag": n, "images": c, "words": w}, ensure_ascii=False)
            for n, c, w in zip(self.names, self.counts, words, strict=True)
        ]
        tags = ",\n  ".join(rows)
        return f'{{"images": {self.images}, "tags": [\n  {tags}\n]}}\n'


def build(
    images: Iterable[Sequence[str]],
    synonyms: Mapping[str, str] | None = None,
    min_count: int = 1,
    only_listed: bool = False,
) -> Vocabulary:
    """Counts the tags of images, the commonest first; ties in the order of the names.

    `synonyms` maps plain words to their tag; a word that is not among them is a tag
    itself, unless `only_listed`. An image counts once for a tag, whatever it calls it.
    Tags of fewer than `min_count` images are left out (arXiv:1805.00932 merges hashtags
    that mean one WordNet synset, and drops those that mean none).

    Raises:
        ValueError: fewer than two tags are left.
    """
    given = {plain(word): tag for word, tag in (synonyms or {}).items()}
    # A tag is a word for itself.
    meaning = {**{plain(tag): tag for tag in given.values()}, **given}
    counts: collections.Counter[str] = collections.Counter()
    met: dict[str, str] = {}
    total = 0
    for words in images:
        total += 1
        for word in filter(None, map(plain, words)):
            tag = meaning.get(word, "" if only_listed else word)
            if tag:
                met[word] = tag
        counts.update({met[w] for w in map(plain, words) if w in met})
    order = sorted(counts, key=lambda tag: (-counts[tag], tag))
    names = tuple(tag for tag in order if counts[tag] >= min_count)
    number = {tag: place for place, tag in enumerate(names)}
    pairs = {**met, **meaning}.items()
    return Vocabulary(
        names=names,
        counts=tuple(counts[tag] for tag in names),
        words={word: number[tag] for word, tag in sorted(pairs) if tag in number},
        images=total,
    )


def read(path: str) -> Vocabulary:
    """Reads a vocabulary file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no vocabulary, has fewer than two tags, or two tags share a
            word.
    """
    place = Path(os.path.expanduser(path))
    try:
        whole = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no vocabulary {path}; make it: {BUILD} --out {path} ..."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); make it again: {BUILD}"
        ) from error
    return _parsed(whole, path)


def _parsed(whole: Any, path: str) -> Vocabulary:
    try:
        rows = [
            (str(row["tag"]), int(row["images"]), [str(word) for word in row["words"]])
            for row in whole["tags"]
        ]
        images = int(whole["images"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{path} is no vocabulary: it needs {{"images": N, "tags": [{{"tag": '
            f'"dog", "images": 12, "words": ["dog", "puppy"]}}, ...]}} ({error!r}). '
            f"Make it: {BUILD}"
        ) from error
    words: dict[str, int] = {}
    for number, (tag, count, synonyms) in enumerate(rows):
        if count < 1:
            raise ValueError(
                f'{path}: tag "{tag}" is of {count} images; leave it out, or give it '
                "the number of images that have it."
            )
        for word in map(plain, synonyms):
            other = words.setdefault(word, number)
            if other != number:
                raise ValueError(
                    f'{path}: "{word}" means two tags, "{rows[other][0]}" and "{tag}"; '
                    "keep it with one."
                )
    names = tuple(tag for tag, _, _ in rows)
    (name, times), *_ = collections.Counter(names).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f'{path} has the tag "{name}" twice; merge the two.')
    try:
        return Vocabulary(
            names=names,
            counts=tuple(count for _, count, _ in rows),
            words=words,
            images=images,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
