"""Which image stands in which batch, and for which process.

The order of an epoch is a function of (seed, epoch) alone, whatever the number of workers or processes: a run that is
resumed in the middle of an epoch repeats nothing and skips nothing. A batch is global: of several processes, each gets
its share.
"""

import hashlib
import struct
from collections.abc import Iterator

import torch
from torch import Tensor


class Order:
    """Positions in a set of n images, batch by batch.

    Args:
        n: Images in the set.
        batch_size: Images in a batch, over all processes.
        rank: Number of this process.
        count: How many processes share a batch; it must divide `batch_size` in training.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, count: int = 1) -> None:
        self.n, self.batch_size, self.rank, self.count = n, batch_size, rank, count

    def __len__(self) -> int:
        """Full batches in an epoch's order; the images of the incomplete one, others in every epoch, are left out."""
        return self.n // self.batch_size

    def steps(self, epochs: float) -> int:
        """Batches that hold as many images as so many passes over the set; at least one."""
        return max(1, round(epochs * self.n / self.batch_size))

    def epochs(self, step: int) -> Iterator[tuple[int, int]]:
        """Epochs without end from a step of the run on, each with its first batch.

        Raises:
            ValueError: There is no full batch, or processes cannot share one equally.
        """
        if not len(self):
            raise ValueError(f'batch_size must be at most the {self.n} images that there are, got {self.batch_size}.')
        if self.batch_size % self.count:
            raise ValueError(f'batch_size must be a multiple of the {self.count} processes, got {self.batch_size}.')
        epoch, start = divmod(step, len(self))
        while True:
            yield epoch, start
            epoch, start = epoch + 1, 0

    def permutation(self, seed: int, epoch: int) -> Tensor:
        """The positions in the order of an epoch."""
        return torch.randperm(self.n, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))

    def shuffled(self, seed: int, step: int) -> Iterator[tuple[int, int, Tensor]]:
        """Epoch, number and this process's positions of each batch, without end from a step of the run on.

        The last, incomplete batch of an epoch is left out.
        """
        for epoch, start in self.epochs(step):
            order = self.permutation(seed, epoch)
            for i in range(start, len(self)):
                yield epoch, i, order[i * self.batch_size : (i + 1) * self.batch_size][self.rank :: self.count]

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's positions in order, for evaluation, and which of them count.

        Process r gets r, r + count, …; where that does not make all shares equally long, the last image again, which
        does not count.
        """
        share = -(-self.n // self.count)
        index = torch.arange(share) * self.count + self.rank
        for part in index.split(max(1, self.batch_size // self.count)):
            yield part.clamp(max=self.n - 1), part < self.n


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits from whole numbers of 64 bits, the same for every process, machine and version of Python.

    It is the BLAKE2b digest (RFC 7693) of the numbers, little-endian.
    """
    digest = hashlib.blake2b(struct.pack(f'<{len(numbers)}q', *numbers), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1
