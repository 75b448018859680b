"""Counter-based random streams: one for each (secret, run, round, attempt, user, purpose), so that order never matters."""

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence

Purpose = Literal["cohort", "data", "batches", "training", "chain", "noise", "server", "downlink", "evaluation"]
"""What a stream is for. Two purposes never share a stream, whatever the rest of the key."""


@dataclass(frozen=True)
class Streams:
    """The randomness of one attempt at one round of one run.

    Attributes:
        secret: the master secret. In a simulation it comes from the seed, so that a run can be repeated. Empty: every stream is drawn from
            the operating system's generator whenever it is asked for, is kept nowhere and comes but once: what real devices use.
        run: names the run: a digest of what is computed, never an engine's own run id (which changes at a restart).
        round: round number, from 1; 0 stands for what happens before the first round.
        attempt: how many releases this round already had.
    """

    secret: str
    run: str
    round: int
    attempt: int = 0

    def generator(self, purpose: Purpose, user: int | None = None) -> np.random.Generator:
        """Return a fresh generator at the beginning of its stream; with a secret the same key gives the same numbers."""
        key = _Key(int.from_bytes(self._key(purpose, user), "big"))
        return np.random.Generator(np.random.Philox(key))  # type: ignore[arg-type]  # NumPy's stub leaves its own interface out

    @contextmanager
    def torch_seeded(self, purpose: Purpose, user: int | None = None, device: str = "cpu") -> Iterator[None]:
        """Seed torch's global generators inside the block and put them back after it: dropout and masking draw from there."""
        seed = int.from_bytes(self._key(purpose, user)[:8], "big") >> 1
        generators = [torch.default_generator]
        if device.startswith("cuda"):
            index = torch.device(device).index
            generators.append(torch.cuda.default_generators[torch.cuda.current_device() if index is None else index])
        # Not torch.manual_seed: for every device that this process never used it keeps a call, with a traceback, for ever.
        before = [generator.get_state() for generator in generators]
        for generator in generators:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)

    def _key(self, purpose: Purpose, user: int | None) -> bytes:
        if not self.secret:
            return secrets.token_bytes(16)
        parts = [self.secret, self.run, str(self.round), str(self.attempt), "" if user is None else str(user), purpose]
        return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).digest()


class _Key(ISeedSequence):
    """Gives `Philox` its key: the stream is that of `Philox(key=...)`, which would ask the system for entropy first, and not use it."""

    def __init__(self, key: int) -> None:
        self._words = (key & (1 << 64) - 1, key >> 64)

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> np.ndarray:
        """Return the two words of the key."""
        return np.array(self._words, dtype=np.uint64)
