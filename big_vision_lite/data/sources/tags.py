"""Images with a few tags each: ids of a vocabulary, with noise if asked for."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np

from big_vision_lite.data.sources import vocabulary as vocabularies
from big_vision_lite.data.sources.arrays import Example, content_hash, fields_of
from big_vision_lite.data.sources.table import Table
from big_vision_lite.data.sources.tfds.source import Tfds
from big_vision_lite.data.sources.vocabulary import Vocabulary
from big_vision_lite.runtime import files

# Of the rows of ids: no tag.
PADDING = -1

# N images, K tags of an image at most


# The Source of types.py, which would import jax: worker processes load no jax.
@runtime_checkable
class Source(Protocol):
    """A data set with random access to its examples."""

    if TYPE_CHECKING:

        @property
        def class_names(self) -> tuple[str, ...]: ...

        @property
        def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def name(self, index: int) -> str: ...


@dataclasses.dataclass(kw_only=True)
class Tags:
    """Makes of the words of each image the ids of their tags: "label" int32 [max_tags].

    `source` hands on lists of words under `key`: `Table(kind="tags")`, or
    `Tfds(label_key=None, keys=("hashtags=>tags",))` with a list of texts. `vocabulary`
    is a file that tools/prepare_dataset.py writes: it says which words mean one tag;
    other words are dropped. Rows are padded with -1. An image without a tag weighs 0
    in the loss; their number is said. `noise` replaces that share of the tags by ones
    drawn from the marginal distribution of the vocabulary (arXiv:1805.00932, section
    3.1.3), by a generator of each image (`noise_seed`, index): always the same ones.
    The first use raises FileNotFoundError or ValueError for a file that is no
    vocabulary, ValueError where no image has a tag, or one has more than `max_tags`.
    """

    source: Source
    vocabulary: str
    key: str = "tags"
    max_tags: int = 16
    noise: float = 0.0
    noise_seed: int = 0

    def __post_init__(self):
        files.check_name(self.vocabulary)
        if self.max_tags < 1:
            raise ValueError(
                f"max_tags={self.max_tags} leaves no room for a tag; use 16, or the "
                "most that an image has."
            )
        if not 0 <= self.noise <= 1:
            raise ValueError(
                f"noise={self.noise} is no share of the tags; use 0.0 to 1.0, 0.1 for "
                "every tenth."
            )
        if not 0 <= self.noise_seed < 2**32:
            raise ValueError(
                f"noise_seed={self.noise_seed} is outside 0 to {2**32 - 1}; use 0."
            )
        if isinstance(self.source, Table) and self.source.kind != "tags":
            raise ValueError(
                f'Tags reads words, and its table has kind="{self.source.kind}"; give '
                'Table(kind="tags").'
            )

    @functools.cached_property
    def _known(self) -> Vocabulary:
        return vocabularies.read(self.vocabulary)

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """Returns the tags of all images, int32 [N, max_tags], padded with -1.

        Reads the words of all images, of a prepared set every record.
        """
        words = _all_words(self.source, self.key)
        ids = self._padded([self._tags(each, n) for n, each in enumerate(words)])
        if len(ids) and (ids[:, 0] == PADDING).all():
            raise ValueError(
                f"not one of {len(ids):,} images has a tag of {self.vocabulary} under "
                f'"{self.key}"; make the vocabulary of this set: {vocabularies.BUILD}'
            )
        return ids

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._known.names

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns a hash of the images' fingerprint, the tags' names and all ids."""
        return content_hash((self.source.fingerprint, *self.class_names, "", self.ids))

    def class_counts(self) -> np.ndarray:
        """Returns the number of images of each tag, int64 [C]."""
        ids = self.ids
        return np.bincount(ids[ids != PADDING], minlength=len(self.class_names))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Returns the example of `source` with "label" int32 [max_tags] for its words.

        Raises:
            ValueError: it has no words, or too many tags.
        """
        index = range(len(self))[index]
        example = dict(self.source[index])
        if self.key not in example:
            raise ValueError(
                f'{self.name(index)} has no "{self.key}", only {sorted(example)}; name '
                'the list of words: key="...", and of a Tfds keys=("...",).'
            )
        found = self._tags(example.pop(self.key), index)
        example["label"] = self._padded([found])[0]
        return example

    def _tags(self, words: Any, index: int) -> Sequence[int]:
        """Returns the tags of an image, with its noise.

        Raises:
            ValueError: these are no words, or too many tags.
        """
        if not isinstance(words, list | tuple) or not all(
            isinstance(word, str) for word in words
        ):
            raise ValueError(
                f'"{self.key}" of {self.name(index)} is {words!r:.60}, no list of '
                "words; name a feature that is a list of texts."
            )
        found = self._noisy(self._known.ids(words), index)
        if len(found) > self.max_tags:
            raise ValueError(
                f"{self.name(index)} has {len(found)} tags, more than max_tags="
                f"{self.max_tags}; use max_tags={len(found)} or more."
            )
        return found

    def _padded(self, tags: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns tags of images as int32 [N, max_tags], padded with -1."""
        ids = np.full((len(tags), self.max_tags), PADDING, np.int32)
        counts = np.array([len(each) for each in tags], np.int64)
        there = np.arange(self.max_tags) < counts[:, None]
        ids[there] = [tag for each in tags for tag in each]
        return ids

    def _noisy(self, tags: Sequence[int], index: int) -> Sequence[int]:
        if not self.noise or not tags:
            return tags
        rng = np.random.Generator(np.random.Philox(key=[self.noise_seed, index]))
        replaced = rng.random(len(tags)) < self.noise
        drawn = np.searchsorted(self._cumulative, rng.random(len(tags)), side="right")
        return tuple(dict.fromkeys(np.where(replaced, drawn, tags).tolist()))

    @functools.cached_property
    def _cumulative(self) -> np.ndarray:
        cumulative = np.cumsum(self._known.marginal())
        return cumulative / cumulative[-1]

    def name(self, index: SupportsIndex) -> str:
        """Returns the origin of example `index`."""
        return self.source.name(index.__index__())

    def __getstate__(self) -> dict[str, Any]:
        return fields_of(self)


def _all_words(source: Source, key: str) -> Iterable[Any]:
    """Yields the words of every image, without reading images where it can be helped.

    Raises:
        ValueError: an example has no `key`.
    """
    if isinstance(source, Table):
        return source.words
    if isinstance(source, Tfds) and source.image_key is not None:
        source = dataclasses.replace(source, image_key=None, label_key=None)
    return (_words(source, key, index) for index in range(len(source)))


def _words(source: Source, key: str, index: int) -> Any:
    example = source[index]
    if key not in example:
        raise ValueError(
            f'{source.name(index)} has no "{key}", only {sorted(example)}; name the '
            'list of words: key="...", and of a Tfds keys=("...",).'
        )
    return example[key]


def describe(found: Sequence[Tags]) -> list[str]:
    """Returns a line on each set of tags: tags, tags an image, images without any."""
    lines = []
    for tags in found:
        ids = tags.ids
        each = (ids != PADDING).sum(axis=1)
        line = (
            f"tags         {len(tags.class_names):,} of {tags.vocabulary}, "
            f"{each.mean():.1f} an image; {(each == 0).sum():,} of {len(ids):,} images "
            "have none: they weigh 0 in the loss"
        )
        if tags.noise:
            line += f"; {tags.noise:.0%} of the tags replaced by chance"
        lines.append(line)
    return list(dict.fromkeys(lines))
