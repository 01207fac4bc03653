"""A held-out part of each class, for folders that bring no split of their own."""

import hashlib
import os
import unicodedata

# Without split folders, this part of each class is held out, chosen by a hash of the
# path: the same files on every machine, whatever the order in which they are listed.
HELD_OUT_PART = 0.1
_HASH_KEY = b"big_vision_lite held-out split 0"

# Relative paths of the images of each class, both sorted.
Files = dict[str, list[str]]


def hold_out(files: Files) -> tuple[Files, Files]:
    """Splits every class into training and held-out images, disjoint, by a hash.

    A class of one image keeps it for training; of more, gives at least one.
    """
    train, held = {}, {}
    for name, paths in files.items():
        count = 0 if len(paths) < 2 else max(1, round(HELD_OUT_PART * len(paths)))
        chosen = set(sorted(paths, key=stable_order)[:count])
        train[name] = [path for path in paths if path not in chosen]
        held[name] = [path for path in paths if path in chosen]
    return train, {name: paths for name, paths in held.items() if paths}


def stable_order(path: str) -> bytes:
    """A key that sorts paths at random, the same way everywhere."""
    plain = unicodedata.normalize("NFC", path).replace(os.sep, "/")
    data = plain.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=16, key=_HASH_KEY).digest()
