"""Random keys by meaning: seed, iteration, stage and name say which numbers a stage draws, not the order of calls.

A key is 128 bits. `key.fold("propose", "Rattle")` names a child; the C++ kernels add the row of the structure
(random.hpp). Inserting a stage, growing a batch, adding an observer or changing the number of workers therefore leaves
every other draw alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

__all__ = ["Key"]


@dataclass(frozen=True)
class Key:
    """A named stream of random numbers.

    Parameters
    ----------
    value : int
        128 bits; `Key.of(seed)` makes one from any integer.
    """

    value: int

    @classmethod
    def of(cls, seed: int) -> Key:
        return cls(0).fold("seed", int(seed))

    def fold(self, *names: str | int) -> Key:
        """The key of a child stream, named by strings and integers."""
        text = "\x1f".join(f"{type(name).__name__[0]}{name}" for name in names)
        digest = hashlib.blake2b(text.encode(), digest_size=16, key=self.value.to_bytes(16, "little")).digest()
        return Key(int.from_bytes(digest, "little"))

    @property
    def words(self) -> tuple[int, int]:
        """Low and high 64 bits, as the compiled kernels take them."""
        return self.value & 0xFFFFFFFFFFFFFFFF, self.value >> 64

    def rng(self) -> np.random.Generator:
        """A NumPy generator for this stream alone."""
        return np.random.Generator(np.random.Philox(key=self.value))
