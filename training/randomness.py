"""Random numbers of a sample, counted instead of streamed.

A number depends only on whose it is (`SampleIdentity`) and what it is for (a purpose such as "crop" or "noise"), so
rank, worker, order and resume cannot change it. No torch, no global state, nothing to save.

The key is a BLAKE2b of the identity, the generator is Philox 4x64 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", 2011). Philox's raw output is fixed for ever; numpy may change what it makes of it, which the golden
values in the tests would show.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class SampleIdentity:
    """Whose random numbers: one showing of one sample in one epoch of one chunk."""

    seed: int
    epoch: int
    chunk: str
    """Name, for example `newest/0004`."""
    key: str
    concept: str = ""
    """Concept of a DreamBooth run; the same picture may serve several."""
    occurrence: int = 0
    """Counts the repeats of a sample within an epoch, from 0."""

    def digest(self, purpose: str) -> bytes:
        """Return 16 bytes that stand for this identity and purpose, the same on every machine."""
        return _digest(
            "sample", int(self.seed), int(self.epoch), self.chunk, self.key, self.concept, int(self.occurrence), purpose
        )

    def generator(self, purpose: str) -> np.random.Generator:
        """Return a generator at the start of the numbers for `purpose`; every call starts anew."""
        return np.random.Generator(np.random.Philox(key=int.from_bytes(self.digest(purpose), "little")))


def uniform(identity: SampleIdentity, purpose: str) -> float:
    """Return one number in [0, 1)."""
    return float(identity.generator(purpose).random())


def normal(identity: SampleIdentity, purpose: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return standard normal float32 numbers of `shape`."""
    return identity.generator(purpose).standard_normal(tuple(shape), dtype=np.float32)


def step_seed(seed: int, global_step: int, micro_batch: int) -> int:
    """Return a 63-bit seed for a model's own dropout in one micro-batch of a step.

    micro_batch: its number in the step, so that the seed does not depend on which rank runs it.
    """
    return int.from_bytes(_digest("step", int(seed), int(global_step), int(micro_batch))[:8], "little") >> 1


def _digest(*parts: int | str) -> bytes:
    # JSON is canonical here: only integers and strings, and no two different tuples give the same text.
    return hashlib.blake2b(json.dumps(parts, separators=(",", ":")).encode(), digest_size=16).digest()
