"""The order of training examples and their random keys: functions of seed and position.

No iterator state exists: a run continues at any step, on any number of hosts.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

# Sets evaluation apart from training in the first word of the Philox key; a seed
# has 32 bits.
EVALUATION = 1 << 63


class Order:
    """The endless stream of example indices, reshuffled in every epoch.

    Position p is in epoch p // size; each epoch is one permutation.
    """

    def __init__(self, size: int, seed: int):
        if not 0 <= seed < 2**32:
            raise ValueError(
                f"seed={seed} is outside 0 to {2**32 - 1}; use --config.seed=0."
            )
        indices = grain.MapDataset.range(size)
        # Any: Grain's own type allows for the holes of filtered streams.
        self._stream: Any = indices.seed(seed).shuffle().repeat()

    def indices(self, positions: Sequence[int]) -> list[int]:
        """Returns the index of the example at each position.

        Many at once: asked for between one image and the next, a position costs three
        times as much, for Grain's code leaves the cache of the core in between.
        """
        return [int(self._stream[position]) for position in positions]


def replacement(seed: int, position: int, attempt: int, size: int) -> int:
    """Returns the index that stands in for an unreadable one, the same on any host."""
    words = np.array([seed, position, attempt], "<u8").tobytes()
    digest = hashlib.blake2b(words, digest_size=8).digest()
    return int.from_bytes(digest, "little") % size


class ExampleGenerator:
    """One numpy generator that starts anew as `Philox(key=[seed, position])`.

    Much cheaper than a new generator for each image. For one thread, and an op
    must not keep it after its call.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._bits = np.random.Philox(key=[seed, 0])
        self._generator = np.random.Generator(self._bits)
        self._start = self._bits.state

    def at(self, position: int) -> np.random.Generator:
        """Returns the generator at the start of the random stream of `position`."""
        self._start["state"]["key"] = np.array([self._seed, position], np.uint64)
        self._bits.state = self._start
        return self._generator
