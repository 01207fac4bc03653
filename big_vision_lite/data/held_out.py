"""A held-out part of each class, for folders that bring no split of their own."""

import hashlib
import os
import unicodedata

# Without split folders, this part of each class is held out, chosen by seed and a hash
# of the path: the same files on every machine, in whatever order they are listed.
HELD_OUT_PART = 0.1

# Relative paths of the images of each class, both sorted.
Files = dict[str, list[str]]


def hold_out(files: Files, seed: int) -> tuple[Files, Files]:
    """Splits every class into training and held-out images, disjoint, by a hash.

    A class of one image keeps it for training; of more, gives at least one.
    """
    train, held = {}, {}
    for name, paths in files.items():
        count = 0 if len(paths) < 2 else max(1, round(HELD_OUT_PART * len(paths)))
        chosen = set(sorted(paths, key=lambda path: stable_order(path, seed))[:count])
        train[name] = [path for path in paths if path not in chosen]
        held[name] = [path for path in paths if path in chosen]
    return train, {name: paths for name, paths in held.items() if paths}


def stable_order(path: str, seed: int) -> bytes:
    """A key that sorts paths at random, the same way everywhere for one seed."""
    plain = unicodedata.normalize("NFC", path).replace(os.sep, "/")
    data = plain.encode("utf-8", "surrogateescape")
    key = b"big_vision_lite held-out split %d" % seed
    return hashlib.blake2b(data, digest_size=16, key=key).digest()
