"""Batches whose images are augmented one by one in worker processes, by torchvision's transforms.

Each image's draws are seeded by (seed, epoch, index), so that they do not depend on the number of workers or processes,
and a run that is resumed in the middle of an epoch repeats nothing and skips nothing.
"""

import random
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from linvision.data.device_batches import DeviceBatches, key


class KeyedImages(Dataset):
    """Augmented images by (epoch, index).

    Args:
        batches: The set; on the CPU.
        transform: What happens to each image, uint8 (C, H, W).
        seed: Seed of the run.
    """

    def __init__(self, batches: DeviceBatches, transform: v2.Transform, seed: int) -> None:
        self.batches, self.transform, self.seed = batches, transform, seed

    def __getitem__(self, epoch_index: tuple[int, int]) -> tuple[Tensor, Tensor]:
        seed = key(self.seed, *epoch_index)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        index = epoch_index[1]
        return self.transform(self.batches.images[index]), self.batches.labels[index]


class KeyedOrder:
    """(epoch, index) of the images in this process's share of each batch, from a step of the run on, without end.

    Args:
        batches: The set.
        seed: Seed of the run.
        step: First step.
    """

    def __init__(self, batches: DeviceBatches, seed: int, step: int) -> None:
        self.batches, self.seed, self.step = batches, seed, step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, start in self.batches.epochs(self.step):
            _, order = self.batches.order(self.seed, epoch)
            for share in self.batches.shares(order, start):
                yield [(epoch, index) for index in share.tolist()]


def ignore_signals(worker: int) -> None:
    """Let a signal to the whole group of processes end the run by its own process, after a checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def worker_stream(
    batches: DeviceBatches,
    seed: int,
    step: int,
    img_size: int,
    hflip: float,
    shift: int,
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `DeviceBatches.stream`, with augmentation in worker processes.

    Args:
        batches: The set; on the CPU.
        seed: Seed of the run.
        step: First step.
        img_size: Size of the images.
        hflip: Probability of a horizontal flip.
        shift: Largest shift in pixels, in each direction.
        workers: Worker processes.
        device: Where the batches go.
    """
    steps: list[v2.Transform] = [v2.RandomHorizontalFlip(hflip)]
    if shift:
        steps.append(v2.RandomCrop(batches.img_size, padding=shift, fill=batches.fill.flatten().tolist()))
    loader = DataLoader(
        KeyedImages(batches, v2.Compose(steps), seed),
        batch_sampler=KeyedOrder(batches, seed, step),
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == 'cuda',
        generator=torch.Generator(),  # else it draws from the generator that dropout draws from
    )
    for images, labels in loader:
        yield batches.normalise(images.to(device, non_blocking=True), img_size), labels.to(device, non_blocking=True)
