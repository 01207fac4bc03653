"""Counts tags and merges synonyms: what `prepare_dataset.py tags` writes."""

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from big_vision_lite.data.sources import LabelKind, Table, Tfds, vocabulary
from big_vision_lite.data.sources.vocabulary import Vocabulary
from big_vision_lite.messages import some

# Columns of a table of synonyms.
SYNONYMS = ("word", "tag")
# Images of the largest tag over those of the smallest, from which resampling is named.
UNEVEN = 10


def build(options: argparse.Namespace) -> int:
    """Writes the vocabulary of the training images and says what is in it."""
    if options.only_listed and not options.synonyms:
        raise ValueError("--only_listed needs --synonyms, the list that is meant.")
    if options.min_count < 1:
        raise ValueError(f"--min_count {options.min_count}: use 1 or more.")
    synonyms = read_synonyms(Path(options.synonyms)) if options.synonyms else {}
    images = list(words_of(options))
    found = vocabulary.build(
        images, synonyms, options.min_count, only_listed=options.only_listed
    )
    place = Path(options.out).expanduser()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(found.text(), encoding="utf-8")
    print("\n".join(report(found, images, options.out)))
    return 0


def words_of(options: argparse.Namespace) -> Iterable[Sequence[str]]:
    """Returns the words of every training image, of a table without splits of all."""
    if options.table:
        table = Table(
            path=options.table,
            image=options.image,
            label=options.tags,
            kind=LabelKind.TAGS,
            root=options.root,
            split_column=options.split_column,
            separator=options.separator,
            split="train" if options.split_column else "all",
        )
        return table.words
    source = Tfds(
        dataset=options.tfds,
        split=options.split,
        data_dir=options.data_dir,
        image_key=None,
        label_key=None,
        keys=(f"{options.tags}=>tags",),
    )
    first = source[0]["tags"]
    if not isinstance(first, list) or not all(isinstance(w, str) for w in first):
        raise ValueError(
            f'"{options.tags}" of {options.tfds} is {first!r:.60}, no list of words; '
            "name a feature that is a list of texts: --tags NAME"
        )
    return (source[index]["tags"] for index in range(len(source)))


def read_synonyms(path: Path) -> dict[str, str]:
    """Returns {word: tag} of a CSV file with the columns word,tag.

    Raises:
        ValueError: it has other columns, empty cells, or a word with two tags.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if not rows or tuple(cell.strip() for cell in rows[0]) != SYNONYMS:
        raise ValueError(
            f"{path} does not begin with {','.join(SYNONYMS)}; write a line for each "
            "synonym: puppy,dog"
        )
    found: dict[str, str] = {}
    for line, row in enumerate(rows[1:], 2):
        if len(row) != 2 or not all(vocabulary.plain(cell) for cell in row):
            raise ValueError(f"{path}: row {line} is {row}; expected a word and a tag.")
        word, tag = vocabulary.plain(row[0]), row[1].strip()
        if found.setdefault(word, tag) != tag:
            raise ValueError(
                f'{path}: "{word}" means {found[word]} and {tag}; keep one of them.'
            )
    return found


def report(found: Vocabulary, images: Sequence[Sequence[str]], out: str) -> list[str]:
    """Returns lines on the vocabulary: its tags, and images that have none of them."""
    each = [len(found.ids(words)) for words in images]
    without = each.count(0)
    pairs = [f"{n} {c:,}" for n, c in zip(found.names, found.counts, strict=True)]
    lines = [
        f"Wrote {out}: {len(found.names):,} tags of {len(found.words):,} words, in "
        f"{found.images:,} images",
        f"  most frequent: {some(pairs, 5)}",
        f"  rarest: {', '.join(pairs[-5:])}",
        f"  tags an image: {sum(each) / len(each):.2f}, at most {max(each)}",
        f"  without any tag: {without:,} images, which weigh 0, or are left out by "
        "Resampled",
    ]
    if found.counts[0] > UNEVEN * found.counts[-1]:
        lines.append("  very uneven: see Resampled(frequency=square_root)")
    lines.append(f"Use it: Tags(source=..., vocabulary={out!r}, max_tags={max(each)})")
    return lines
