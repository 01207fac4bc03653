"""Ops on captions: one is written from labels and names, and turned into ids."""

import dataclasses
import enum
import string
import warnings

import numpy as np

from big_vision_lite.data.ops.decode import Example
from big_vision_lite.data.ops.tokenizers import Bytes, Tokenizer
from big_vision_lite.data.undecodable import UndecodableImage
from big_vision_lite.messages import did_you_mean, some

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Spelling(enum.StrEnum):
    """What is done to a text before it is split into ids."""

    AS_IS = "as_is"
    # Small letters: SigLIP 2.
    LOWER = "lower"
    # Small letters without ASCII punctuation, single spaces: SigLIP.
    CANONICAL = "canonical"

    def apply(self, text: str) -> str:
        match self:
            case Spelling.AS_IS:
                return text
            case Spelling.LOWER:
                return text.lower()
            case Spelling.CANONICAL:
                return " ".join(text.lower().translate(_PUNCTUATION).split())


class Empty(enum.StrEnum):
    """What is done with a caption of which no id is left."""

    # Stops with the name of the example.
    REFUSE = "refuse"
    # As an image that does not decode: another takes its place in training, it is
    # counted and listed, and more than 0.1 % stop the run.
    SKIP = "skip"
    # A text of marks and padding alone.
    KEEP = "keep"


class TooLong(enum.StrEnum):
    """What is done with a caption of more than `length` ids."""

    # Ids at the end are dropped; said once.
    CUT = "cut"
    # Stops with the name of the example.
    REFUSE = "refuse"


@dataclasses.dataclass(kw_only=True)
class Tokenize:
    """Replaces a caption (str) under `key` by ids under `into`: int32 [length].

    `begin` and `end` are ids put before and after those of `tokenizer`, None for none;
    `padding` fills the rest. The end stays where a text is cut. Of a list of captions
    one is drawn; `captions=K` takes the first K instead, int32 [K, length], and says
    under "<into>_valid", bool [K], which of them are there. Nothing checks that ids are
    below the vocabulary of a model, which gives NaN for them.

    Raises:
        ValueError: there is no caption, an empty one (`empty`), a longer one
            (`too_long`), or one that is no text.
    """

    key: str = "caption"
    into: str = "text"
    tokenizer: Tokenizer = dataclasses.field(default_factory=Bytes)
    length: int = 64
    begin: int | None = None
    end: int | None = None
    padding: int = 0
    spelling: Spelling = Spelling.AS_IS
    captions: int = 0
    empty: Empty = Empty.REFUSE
    too_long: TooLong = TooLong.CUT

    def __post_init__(self):
        if self.length <= self._marks or self.captions < 0:
            raise ValueError(
                f"Tokenize(length={self.length}, captions={self.captions}): the length "
                f"is at least {1 + self._marks}, marks included; captions=0 takes one."
            )

    @property
    def _marks(self) -> int:
        return (self.begin is not None) + (self.end is not None)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        if self.key not in example:
            raise ValueError(
                f'Tokenize: no "{self.key}" among {some(sorted(example))}.'
                f"{did_you_mean(self.key, example)} Let the source read it, for "
                f'example Tfds(keys=("{self.key}",)).'
            )
        rest = {name: value for name, value in example.items() if name != self.key}
        texts = self._texts(example[self.key])
        if not self.captions:
            one = texts[int(rng.integers(len(texts)))] if len(texts) > 1 else texts[0]
            return rest | {self.into: self.ids(one)}
        ids = np.full((self.captions, self.length), self.padding, np.int32)
        taken = texts[: self.captions]
        for row, text in enumerate(taken):
            ids[row] = self.ids(text)
        valid = np.arange(self.captions) < len(taken)
        return rest | {self.into: ids, f"{self.into}_valid": valid}

    def ids(self, text: str) -> np.ndarray:
        """Returns the ids of one text, with marks and padding: int32 [length]."""
        found = list(self.tokenizer.encode(self.spelling.apply(text)))
        if not found:
            self._check_empty(text)
        room = self.length - self._marks
        if len(found) > room:
            self._say_cut(text, len(found))
        marks = [[] if mark is None else [mark] for mark in (self.begin, self.end)]
        ids = [*marks[0], *found[:room], *marks[1]]
        ids += [self.padding] * (self.length - len(ids))
        return np.array(ids, np.int32)

    def _texts(self, value: object) -> list[str]:
        texts = list(value) if isinstance(value, list | tuple) else [value]
        if not texts or not all(isinstance(text, str) for text in texts):
            kinds = sorted({type(text).__name__ for text in texts})
            raise ValueError(
                f'Tokenize: "{self.key}" is {some(kinds)}, not a text or a list of '
                "them; name another key."
            )
        return [str(text) for text in texts]

    def _check_empty(self, text: str) -> None:
        came = f'Tokenize: "{self.key}" is {text!r}, of which no id is left'
        match self.empty:
            case Empty.SKIP:
                raise UndecodableImage(came)
            case Empty.REFUSE:
                raise ValueError(
                    f"{came}. Remove the example, or let it be skipped and counted: "
                    "Tokenize(empty=Empty.SKIP)."
                )

    def _say_cut(self, text: str, count: int) -> None:
        if self.too_long == TooLong.REFUSE:
            shown = text if len(text) < 60 else f"{text[:57]}..."
            raise ValueError(
                f"Tokenize: {shown!r} has {count} ids and {self._marks} marks, more "
                f"than length={self.length}. Use a larger length, or "
                "too_long=TooLong.CUT."
            )
        # Always the same words, so that Python says them once.
        warnings.warn(
            f'Tokenize: texts under "{self.key}" of more than length={self.length} ids '
            "are cut. Give a larger length, here and in the model, to see all of them, "
            "or too_long=TooLong.REFUSE to know which they are.",
            stacklevel=2,
        )


@dataclasses.dataclass(kw_only=True)
class Describe:
    """Writes a caption: what the class is called, and `words` found in another text.

    `names` are those of classes, in the order of "label". `words` are looked for in the
    text under `text`, whatever its case, and added in their order; "oblique=>italic"
    adds another word than it looks for. The caption goes to `key`, the other text is
    dropped: "capital A bold italic" of class "capital A" and a "DejaVu-BoldOblique".
    """

    names: tuple[str, ...]
    text: str = ""
    words: tuple[str, ...] = ()
    key: str = "caption"

    def __post_init__(self):
        if bool(self.text) != bool(self.words):
            raise ValueError(
                f'Describe(text="{self.text}", words={self.words}): words are looked '
                "for in a text; give both or none."
            )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        missing = {"label", self.text} - {""} - example.keys()
        if missing:
            raise ValueError(
                f"Describe: no {some(sorted(missing))} among {some(sorted(example))}; "
                "let the source read it."
            )
        label = example["label"]
        if not isinstance(label, int | np.integer) or not label < len(self.names):
            raise ValueError(
                f"Describe: the label {label} is none of {len(self.names)} names; give "
                "one for each class of the source, one label an image."
            )
        words = [self.names[label]]
        if self.text:
            seen = example[self.text].lower()
            pairs = (word.partition("=>") for word in self.words)
            words += [new or old for old, _, new in pairs if old.lower() in seen]
        rest = {name: value for name, value in example.items() if name != self.text}
        return rest | {self.key: " ".join(dict.fromkeys(words))}
