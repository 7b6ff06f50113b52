"""The order in which rows are used: shuffled, exactly once an epoch, a pure function of (seed, step).

No JAX here and no hidden generator state, so a run resumed at step N sees the batches that an undisturbed run saw.
"""

import numpy as np

from jaxrl_llm.errors import UserError


def epoch_order(n: int, epoch: int, seed: int) -> np.ndarray:
    """A permutation of `range(n)`, int64 [n], that depends on (n, epoch, seed) alone.

    Philox is keyed by (seed, epoch) and its raw 64-bit words are sorted: unlike `Generator.permutation`, whose stream numpy
    may change between versions, raw words are the same everywhere.
    """
    key = np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(n)
    return np.argsort(words, kind="stable")


class ShuffledSchedule:
    """Plain shuffled epochs: the baseline schedule, and the shape (protocol) that every schedule has.

    `batch(step)` gives the row indices of a step, int64 [batch_size]. Batches run on across the end of an epoch, so no row is
    left over and all batches have one size (one compilation); every row is used exactly once an epoch. A batch that spans two
    epochs holds no row twice: rows of the new epoch that the batch already has are moved a little later in that epoch, since
    two groups of one prompt in a batch would be taken for one.

    Args:
      n: number of rows.
      batch_size: rows a step; at most n.
      seed: of the shuffling.

    Raises:
      UserError: batch_size is below 1 or above n.
    """

    def __init__(self, n: int, batch_size: int, seed: int = 0):
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: at least 1 row a step is needed")
        if batch_size > n:
            raise UserError(f"batch size {batch_size} is larger than the {n} rows there are: lower it, or give more rows")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, step: int) -> np.ndarray:
        """Row indices of a step, int64 [batch_size]."""
        epoch, offset = divmod(step * self.batch_size, self.n)
        head = self.epoch(epoch)[offset : offset + self.batch_size]
        if len(head) == self.batch_size:
            return head.copy()
        return np.concatenate([head, self.epoch(epoch + 1)[: self.batch_size - len(head)]])

    def epoch(self, epoch: int) -> np.ndarray:
        """The order of one epoch, int64 [n]. It depends on the epoch before it, so a far epoch is walked to."""
        if epoch < self._epoch:
            self._epoch, self._order = -1, np.empty(0, np.int64)
        while self._epoch < epoch:
            following = self._epoch + 1
            self._order = self._after(self._order, following)
            self._epoch = following
        return self._order

    def _after(self, previous: np.ndarray, epoch: int) -> np.ndarray:
        order = epoch_order(self.n, epoch, self.seed)
        begun = epoch * self.n % self.batch_size  # rows that the spanning batch already has from the epoch before
        if not begun:
            return order
        wanted = self.batch_size - begun
        taken = np.isin(order, previous[self.n - begun :])
        clash = np.flatnonzero(taken[:wanted])
        swap = wanted + np.flatnonzero(~taken[wanted:])[: len(clash)]
        order[clash], order[swap] = order[swap], order[clash]
        return order

    def observe(self, step: int, indices: np.ndarray, pass_rates: np.ndarray) -> None:
        """Told what a step's rollouts scored; a fixed schedule has no use for it."""

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold beside the step: nothing."""
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Takes what `state` gave: nothing."""
