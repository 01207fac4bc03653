"""Images of rare tags repeated: an epoch in which frequent tags count for less."""

import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from big_vision_lite.data.sources.arrays import Example, content_hash, fields_of
from big_vision_lite.data.sources.tags import PADDING, Source, Tags

# Grain shuffles indices of 32 bits with a sign.
LONGEST = 2**31 - 1


class Frequency(enum.StrEnum):
    """How often a tag of frequency f is seen, the most frequent one as often as it is.

    NATURAL      f: every image once
    SQUARE_ROOT  sqrt(f)
    UNIFORM      all alike
    """

    NATURAL = "natural"
    SQUARE_ROOT = "square_root"
    UNIFORM = "uniform"


@dataclasses.dataclass(kw_only=True)
class Resampled:
    """Repeats each image of `source` by its factor: the largest of its tags' factors.

    A tag that a share f of the images has gets max(1, phi(threshold / f)), where phi is
    the square root, the identity (uniform) or 1 (natural), after arXiv:1805.00932.
    `threshold`, a share of the images, is None for that of the most frequent tag.
    Images without a tag are left out. The whole part of a factor is exact, for the rest
    a coin falls (`seed`) once and for all, so that the list of an epoch is one list,
    which the order of the run permutes in every epoch: any step is found without a
    state, and resume is exact. The first use raises ValueError for a threshold below
    every tag's frequency, which would change nothing.
    """

    source: Source
    frequency: Frequency = Frequency.SQUARE_ROOT
    threshold: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.source, Tags):
            raise ValueError(
                "Resampled repeats images by their tags, and "
                f"{type(self.source).__name__} has none; give "
                'Tags(source=..., vocabulary="...").'
            )
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold={self.threshold} is no share of the images above 0; use "
                "0.001, or none for the frequency of the most frequent tag."
            )
        if self.threshold is not None and self.frequency == Frequency.NATURAL:
            raise ValueError(
                f"threshold={self.threshold} means nothing with frequency=natural, "
                "which repeats no image; leave it out."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is outside 0 to {2**32 - 1}; use 0.")

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Returns the sum of the factors up to each image, float64 [N]."""
        assert isinstance(self.source, Tags), "checked above"
        factors = image_factors(
            self.source.ids, self.source.class_counts(), self.frequency, self.threshold
        )
        if self.threshold is not None and factors.max() == 1:
            raise ValueError(
                f"threshold={self.threshold} is below the frequency of every tag: no "
                'image would be repeated. Use a larger one, or frequency="natural".'
            )
        ends = np.cumsum(factors)
        if ends[-1] > LONGEST:
            raise ValueError(
                f"an epoch would have {ends[-1]:.3g} images, more than {LONGEST:,}; "
                "use a smaller threshold, which repeats rare tags less."
            )
        return ends

    @functools.cached_property
    def _first(self) -> float:
        """Returns where the first of the points a distance 1 apart lies, in 0..1."""
        return 1 - np.random.default_rng(self.seed).random()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @functools.cached_property
    def fingerprint(self) -> str:
        parts = (self.frequency, self.threshold, self.seed)
        return content_hash((self.source.fingerprint, *map(str, parts)))

    def __len__(self) -> int:
        return int(np.floor(self._ends[-1] - self._first)) + 1

    def place(self, index: SupportsIndex) -> int:
        """Returns the image of `source` at place `index` of the list of an epoch."""
        # Points at a distance of 1 over intervals as long as the factors: an interval
        # of 2.3 holds two or three.
        point = range(len(self))[index] + self._first
        return int(np.searchsorted(self._ends, point, side="left"))

    def __getitem__(self, index: SupportsIndex) -> Example:
        return self.source[self.place(index)]

    def name(self, index: SupportsIndex) -> str:
        """Returns the origin of the image at a place of the list."""
        return self.source.name(self.place(index))

    def __getstate__(self) -> dict[str, Any]:
        # With the factors if they are known, so that worker processes need not read all
        # tags again.
        known = {name: x for name, x in vars(self).items() if name == "_ends"}
        return {**fields_of(self), **known}


def describe(found: Sequence[Resampled]) -> list[str]:
    """Returns a line on each list of an epoch: its length, and what is left out."""
    return [
        f"resampled    {each.frequency}: an epoch is {len(each):,} images for "
        f"{len(each.source):,}, at most {np.diff(each._ends, prepend=0).max():.3g} "
        "times one; images without a tag are left out"
        for each in found
    ]


def image_factors(
    ids: np.ndarray,
    counts: np.ndarray,
    frequency: Frequency,
    threshold: float | None,
) -> np.ndarray:
    """Returns how often each image is to be seen, float64 [N]: 0, or 1 and more.

    `ids` [N, K] are tags padded with -1, `counts` [C] the images of each tag. Tags are
    compared by their share of the images that have one.
    """
    tagged = (ids != PADDING).any(axis=1)
    with np.errstate(divide="ignore"):
        # A tag without images gets inf, which no image takes.
        wanted = counts.max() if threshold is None else threshold * tagged.sum()
        ratio = wanted / counts
    match frequency:
        case Frequency.NATURAL:
            tag_factors = np.ones(len(counts))
        case Frequency.SQUARE_ROOT:
            tag_factors = np.maximum(1, np.sqrt(ratio))
        case Frequency.UNIFORM:
            tag_factors = np.maximum(1, ratio)
    # The last one is for the padding.
    return np.append(tag_factors, 0)[ids].max(axis=1)
