"""Makes a set of noisy tags of a labelled set: what hashtags are to photos, in small.

  python tools/noisy_tags.py glyphs32_latin --data_dir DATA_DIR --out DATA_DIR \
      --name glyphs32_tags --text font --zipf 1 --synonyms 3 --missing 0.2 --chatter 0.5

Reads a prepared TFDS set and writes another, with the same images and labels and a list
"tags" of words for each: those of the class's name ("Ankle boot" gives ankle and boot,
"A" gives a and capital, "7" gives 7 and digit) and of styles (bold, italic, ...) in the
feature `text`.

zipf      of training images of the class of rank r (by chance) the share 1 / r^zipf is
          kept; 0 keeps all
synonyms  words that mean one tag; the n-th is used with a weight of 1 / n
missing   share of the words that nobody wrote
chatter   words an image, on average, that say nothing of it, of Zipf's frequencies

Beside the set lies synonyms.csv, for `prepare_dataset.py tags --synonyms`. Everything
is drawn anew for every image from (seed, its place), so that the same command writes
the same set.
"""

import argparse
import collections
import dataclasses
import functools
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import prepare_dataset  # beside this file, which runs as a script

from big_vision_lite.data.sources import Tfds
from big_vision_lite.data.sources.arrays import content_hash
from big_vision_lite.data.sources.tfds import folder as tfds_folder
from big_vision_lite.data.sources.tfds import prepared_set

# {word in the name of a font's file: style}.
STYLES = {
    **{word: word for word in ("bold", "italic", "light", "condensed", "mono", "sans")},
    **{
        word: word for word in ("serif", "script", "thin", "black", "medium", "outline")
    },
    **{"oblique": "italic", "slanted": "italic", "bd": "bold", "it": "italic"},
    **{
        "heavy": "black",
        "typewriter": "mono",
        "cond": "condensed",
        "narrow": "condensed",
    },
}
# Endings of the words that mean the same.
ENDINGS = ("", "pic", "love", "oftheday", "gram", "life", "time", "art", "fan", "shot")
CHATTER = (
    "instagood",
    "love",
    "happy",
    "cute",
    "nofilter",
    "follow",
    "like4like",
    "tbt",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        return write(options)
    except (ImportError, OSError, ValueError) as error:
        print(f"Not prepared: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("dataset", help="a prepared TFDS set with labels")
    arguments.add_argument("--data_dir", help="where it lies")
    arguments.add_argument("--out", required=True, help="folder of prepared sets")
    arguments.add_argument("--name", required=True, help="of the set, like my_tags")
    arguments.add_argument("--version", default="1.0.0")
    arguments.add_argument("--text", help="a feature of text that holds styles")
    arguments.add_argument("--zipf", type=float, default=0.0)
    arguments.add_argument("--synonyms", type=int, default=1)
    arguments.add_argument("--missing", type=float, default=0.0)
    arguments.add_argument("--chatter", type=float, default=0.0)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--shard_mb", type=float, default=256, help="size of a file")
    arguments.add_argument("--threads", type=int, default=8)
    return arguments


@dataclasses.dataclass(kw_only=True)
class Writers:
    """What people write of an image: `words` of its class and style, more or less."""

    synonyms: int = 1
    missing: float = 0.0
    chatter: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.synonyms <= len(ENDINGS):
            raise ValueError(
                f"--synonyms {self.synonyms}: use 1 (one word a tag) to {len(ENDINGS)}."
            )
        if not 0 <= self.missing < 1 or not 0 <= self.chatter <= len(CHATTER):
            raise ValueError(
                f"--missing {self.missing} is to be a share below 1, --chatter "
                f"{self.chatter} a number of words from 0 to {len(CHATTER)}."
            )

    def write(self, words: Sequence[str], place: int) -> list[str]:
        """Returns the words of the image at `place`, in a random order."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, place]))
        kept = [word for word in words if rng.random() >= self.missing]
        chosen = rng.choice(self.synonyms, len(kept), p=zipf(self.synonyms))
        found = [word + ENDINGS[n] for word, n in zip(kept, chosen, strict=True)]
        said = rng.random(len(CHATTER)) < np.minimum(
            1, self.chatter * zipf(len(CHATTER))
        )
        found += [word for word, is_said in zip(CHATTER, said, strict=True) if is_said]
        return [found[n] for n in rng.permutation(len(found))]


def zipf(count: int, exponent: float = 1.0) -> np.ndarray:
    """Returns shares that fall with the rank: 1, 1/2, 1/3, ... over their sum."""
    weights = 1.0 / np.arange(1, count + 1) ** exponent
    return weights / weights.sum()


@dataclasses.dataclass(kw_only=True)
class Written:
    """The images `rows` of a prepared split with words, as a source to pack."""

    source: Tfds
    rows: list[int]
    writers: Writers
    # The feature of text, "" for none.
    text: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        example = self.source[self.rows[row]]
        words = words_of_class(self.source.class_names[example["label"]])
        if self.text:
            words = list(dict.fromkeys([*words, *styles(example.pop("text"))]))
        return {**example, "tags": self.writers.write(words, self.rows[row])}

    def relative_path(self, row: int) -> str:
        """Names the image by its place in the split that it comes from."""
        return f"{self.source.dataset}/{self.source.split}/{self.rows[row]}"

    @functools.cached_property
    def fingerprint(self) -> str:
        settings = repr((self.writers, self.text, self.rows))
        return content_hash((self.source.fingerprint, settings))


def words_of_class(name: str) -> list[str]:
    """Returns what is said of a class: its words, of a character its kind, too."""
    if len(name) == 1:
        kinds = ((name.isdigit(), "digit"), (name.isupper(), "capital"))
        kind = next((kind for holds, kind in kinds if holds), "small")
        return [name.lower(), kind]
    return [word.lower() for word in re.findall(r"\w+", name)]


def styles(text: str) -> list[str]:
    """Returns the styles in the name of a font's file: "Sans-BoldOblique.ttf"."""
    stem = text.rpartition("/")[2].partition(".")[0]
    parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", stem)
    found = (STYLES.get(part.lower()) for part in parts)
    return list(dict.fromkeys(style for style in found if style))


def thinned(labels: np.ndarray, exponent: float, seed: int) -> list[int]:
    """Returns the rows that are kept: of a class of rank r the share 1 / r^exponent."""
    rng = np.random.default_rng(seed)
    kept = []
    for rank, label in enumerate(rng.permutation(np.unique(labels)), 1):
        rows = np.flatnonzero(labels == label)
        count = max(1, round(len(rows) / rank**exponent))
        kept += rng.permutation(rows)[:count].tolist()
    return sorted(kept)


def write(options: argparse.Namespace) -> int:
    """Writes the set, and the table of synonyms beside it."""
    final = prepare_dataset.place_for(options)
    prepared = prepared_set.load(tfds_folder.find(options.dataset, options.data_dir))
    writers = Writers(
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(Writers)}
    )
    if options.zipf < 0:
        raise ValueError(f"--zipf {options.zipf} is an exponent; use 0 to keep all.")
    sources = {}
    for split in prepared.splits:
        source = Tfds(
            dataset=options.dataset,
            split=split,
            data_dir=options.data_dir,
            keys=(f"{options.text}=>text",) if options.text else (),
        )
        rows = list(range(len(source)))
        if "train" in split and options.zipf:
            only = dataclasses.replace(source, image_key=None, keys=())
            labels = np.asarray([only[row]["label"] for row in rows])
            rows = thinned(labels, options.zipf, options.seed)
        sources[split] = Written(
            source=source, rows=rows, writers=writers, text=options.text or ""
        )
    names = next(iter(sources.values())).source.class_names
    about = prepare_dataset.About(
        names=names, shape=(-1, -1, -1), origin=options.dataset, tags=True
    )
    sizes = {split: [1] * len(source) for split, source in sources.items()}
    code = prepare_dataset.pack(options, final, sources, sizes, [], about)
    split, first = next(iter(sources.items()))
    counts = collections.Counter(
        word for row in range(len(first)) for word in first[row]["tags"]
    )
    shown = ", ".join(f"{word} {count:,}" for word, count in counts.most_common(8))
    print(f"  {len(counts):,} words in the tags of {split}: {shown}, ...")
    (final / "synonyms.csv").write_text(synonym_table(names, options), encoding="utf-8")
    print(f"  their synonyms: {final / 'synonyms.csv'}")
    return code


def synonym_table(names: Sequence[str], options: argparse.Namespace) -> str:
    """Returns the CSV of which word means which tag, chatter left out."""
    tags = dict.fromkeys(word for name in names for word in words_of_class(name))
    if options.text:
        tags.update(dict.fromkeys(STYLES.values()))
    rows = [f"{tag}{end},{tag}" for tag in tags for end in ENDINGS[: options.synonyms]]
    return "\n".join(("word,tag", *rows)) + "\n"


if __name__ == "__main__":
    sys.exit(main())
