"""Batches of a stream (WebDataset shards and their like), read and changed in worker processes.

timm's readers shuffle a stream by (seed, epoch) at a given number of workers and processes, and an image's draws are
seeded by its place in it. A run that is resumed in the middle of an epoch reads up to there, and skips nothing.
"""

import logging
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from linvision.data.augmentation import Transform
from linvision.data.loader_batches import LoaderBatches, batches_of, create_loader, evaluation_transform
from linvision.data.order import seed_of
from linvision.data.timm_sets import TimmStream
from linvision.data.timm_transform import changed


class ChangedStream(IterableDataset):
    """A stream's images, changed under a seed made of numbers, worker and place: `(image, label, complaints)`.

    Args:
        stream: timm's dataset.
        transform: What happens to each image.
        numbers: Seed, epoch and process.
        ends: Say after the last image what was left out since, beside an image labelled -1.
    """

    def __init__(self, stream: Any, transform: Transform, *numbers: int, ends: bool = False) -> None:
        self.stream, self.transform, self.numbers, self.ends = stream, transform, numbers, ends

    def __iter__(self) -> Iterator[tuple[Tensor, int, str]]:
        worker, heard = get_worker_info(), Complaints()
        readers = logging.getLogger('timm.data.readers')
        readers.addHandler(heard)  # timm's readers log a sample that they cannot read, and go on
        try:
            for i, (image, label) in enumerate(self.stream):
                seed = seed_of(*self.numbers, worker.id if worker else 0, i)
                try:
                    ready = changed(self.transform, image, f'image {i} of the stream', seed)
                except OSError as error:
                    heard.messages.append(str(error))
                    continue
                yield ready, label, heard.collect()
            if self.ends and (rest := heard.collect()):
                yield self.transform(Image.new('RGB', (8, 8)), 0), -1, rest
        finally:
            readers.removeHandler(heard)


class Complaints(logging.Handler):
    """What timm's readers log of samples that they leave out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep an error, with the name of its sample; other warnings are none of a sample."""
        error = sys.exc_info()[1]
        if error is None:
            return
        self.messages.append(f'{name_of_sample(error)} cannot be read ({type(error).__name__}).')

    def collect(self) -> str:
        """What was logged since the last call, a line for each sample."""
        messages, self.messages = self.messages, []
        return '\n'.join(messages)


def name_of_sample(error: BaseException) -> str:
    """Which sample of which shard webdataset met an error in.

    Neither the error nor timm's log says it: timm gives webdataset an error handler of its own, which cannot be
    replaced and is told the error alone. What knows the sample is webdataset's loop over samples or shards, in which
    the error was raised, as a variable of its own: here it is read from there. Where webdataset names it otherwise, the
    complaint only says 'a sample in a shard'.
    """
    variables = error.__traceback__.tb_frame.f_locals if error.__traceback__ else {}
    sample = variables.get('source') or variables.get('sample') or {}
    return f'{sample.get("__key__", "a sample")} in {sample.get("__url__") or sample.get("url") or "a shard"}'


class StreamBatches(LoaderBatches):
    """A `TimmStream`, cut into normalised batches; as its parent, without random access."""

    images: TimmStream

    def stream(self, seed: int, step: int, img_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented batches without end; the batches of an epoch before `step` are read and passed over.

        Raises:
            OSError: An epoch is empty, or a sample cannot be read, with 'stop'.
            ValueError: There are fewer shards than workers.
        """
        order, share = self.order, self.order.batch_size // self.order.count
        transform = self.training_transform(img_size)
        for epoch, start in order.epochs(step):
            stream = self.images.open(True, seed, epoch, share, self.workers, order.rank, order.count)
            changed = ChangedStream(stream, transform, seed, epoch, order.rank)
            batches = islice(
                batches_of(
                    create_loader(changed, self.workers, self.preparation, seed_of(seed, epoch), batch_size=share)
                ),
                start,
                len(order),
            )
            number = -1
            for number, (images, labels, complaints) in enumerate(batches, start):
                self.bad_images.note('\n'.join(complaints).splitlines())
                images = self.preparation.augmented(images, img_size, img_size, seed, epoch, number)
                yield images, labels.to(images.device, non_blocking=True)
            if number < 0:
                raise OSError(f'No sample of {self.images.arguments["name"]} can be read.')

    def ordered(self, img_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share in order, never augmented; every process reads all. A label of -1 does not count."""
        order, change = self.order, evaluation_transform(self.preparation.mean, img_size, **self.cropping)
        stream = self.images.open(False, 0, 0, order.batch_size, self.workers)
        changed = ChangedStream(stream, change, ends=True)
        loader = create_loader(changed, self.workers, self.preparation, batch_size=order.batch_size)
        for images, labels, complaints in batches_of(loader):
            self.bad_images.note('\n'.join(complaints).splitlines())
            index = torch.arange(-(-len(labels) // order.count)) * order.count + order.rank
            counts, index = index < len(labels), index.clamp(max=len(labels) - 1)
            labels = torch.where(counts, labels[index], -1).to(self.preparation.device, non_blocking=True)
            yield self.preparation.plain(images[index], img_size), labels
