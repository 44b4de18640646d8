"""A plain convolutional network as large as the pico models, trained by the clock, to compare pixel models with.

The clock is that of the processor: other jobs on the machine take no time from the network.

    python -m scripts.tools.plain_cnn --minutes 20 --threads 1

Five 3×3 convolutions with batch norm and ReLU, two poolings, a mean over the image; AdamW, one cycle of the learning
rate, flips and shifts, on a small image set. Scores all test images; prints JSON. With `--state FILE` a training that
was stopped goes on; it loses two minutes at most.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from linvision.data import Augmentation, create_batches, create_dataset, split_validation
from linvision.guard import end, guarded
from linvision.train.evaluate import evaluate
from linvision.train.metrics import machine
from linvision.train.precision import autocast, has_bf16

WIDTHS = (38, 77, 154)  # 202,073 parameters with one channel and ten classes
BATCH_SIZE, LR, WARMUP = 128, 4e-3, 0.1
SAVE_EVERY = 120  # seconds of the processor


def plain_cnn(in_chans: int, num_classes: int) -> nn.Sequential:
    """The network."""
    a, b, c = WIDTHS

    def conv(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    layers = [*conv(in_chans, a), *conv(a, a), nn.MaxPool2d(2), *conv(a, b), *conv(b, b), nn.MaxPool2d(2), *conv(b, c)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, num_classes))


def train_cnn(
    dataset: str,
    data_dir: Path,
    minutes: float,
    val_fraction: float = 0.0,
    lr: float = LR,
    seed: int = 0,
    shift: int = 0,
    state: Path | None = None,
) -> dict[str, Any]:
    """Train for some minutes, then score.

    Args:
        dataset: Name of a dataset in memory.
        data_dir: The folder that holds it.
        minutes: Minutes of training, on each thread's processor.
        val_fraction: Share of the training set that is kept apart and scored instead of the test set (0: none).
        lr: Highest learning rate.
        seed: Seed of weights, order and augmentation.
        shift: Largest random shift, in pixels.
        state: File to go on from and to save to.

    Returns:
        Scores, `images_seen`, `train_minutes`, `num_parameters`, `precision`.
    """
    torch.manual_seed(seed)
    train_set, val_set = split_validation(create_dataset(dataset, data_dir, 'train'), val_fraction, seed)
    test_set = val_set if val_fraction else create_dataset(dataset, data_dir, 'test')
    statistics, device = train_set.statistics(), torch.device('cpu')
    batches = create_batches(train_set, BATCH_SIZE, *statistics, device, Augmentation('torch', hflip=0.5, shift=shift))
    model = plain_cnn(train_set.in_chans, len(train_set.classes)).to(memory_format=torch.channels_last)
    precision = 'bf16' if has_bf16(device)[0] else 'fp32'
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    seconds = 60 * minutes * torch.get_num_threads()
    asked = {'dataset': dataset, 'minutes': minutes, 'lr': lr, 'seed': seed, 'shift': shift, 'of': len(train_set)}
    asked['precision'] = precision
    steps, spent = restore(state, asked, model, optimizer) if state else (0, 0.0)
    start, saved, progress = time.process_time() - spent, spent, spent / seconds
    for images, labels in batches.stream(seed, steps, train_set.img_size):
        for group in optimizer.param_groups:  # up in a line, then down in a line
            group['lr'] = lr * min(progress / WARMUP, (1 - progress) / (1 - WARMUP))
        optimizer.zero_grad()
        with autocast(device, precision):
            loss = nn.functional.cross_entropy(model(images.to(memory_format=torch.channels_last)), labels)
        loss.backward()
        optimizer.step()
        steps, spent = steps + 1, time.process_time() - start
        progress = spent / seconds
        if state and (progress >= 1 or spent - saved >= SAVE_EVERY):
            save(state, asked, model, optimizer, steps, spent)
            saved = spent
        if progress >= 1:
            break
    return {
        **evaluate(model, create_batches(test_set, 100, *statistics, device), train_set.img_size),
        'images_seen': steps * BATCH_SIZE,
        'train_minutes': progress * minutes,
        'num_parameters': sum(p.numel() for p in model.parameters()),
        'lr': lr,
        'seed': seed,
        'shift': shift,
        'precision': precision,
        **machine(device),
    }


def save(
    file: Path, asked: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, spent: float
) -> None:
    """Write all that a training goes on from; the file is whole at any moment."""
    content = {'asked': asked, 'model': model.state_dict(), 'optimizer': optimizer.state_dict()}
    part = file.with_suffix('.part')
    torch.save({**content, 'steps': steps, 'spent': spent}, part)
    os.replace(part, file)


def restore(file: Path, asked: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Read what `save` wrote: steps and seconds; none of both where there is no file."""
    if not file.is_file():
        return 0, 0.0
    found = torch.load(file, weights_only=True)
    if found['asked'] != asked:
        end(f'{file} is of another training: {found["asked"]}. Asked for is {asked}. Name another --state.')
    model.load_state_dict(found['model'])
    optimizer.load_state_dict(found['optimizer'])
    return found['steps'], found['spent']


def main(
    minutes: float = 20.0,
    dataset: str = 'fashion_mnist',
    data_dir: Path = Path('data'),
    val_fraction: float = 0.0,
    lr: float = LR,
    seed: int = 0,
    threads: int = 0,
    shift: int = 0,
    state: Path | None = None,
) -> None:
    """Train and score the network.

    Args:
        minutes: Minutes of training, on each thread's processor.
        dataset: Name of a dataset in memory.
        data_dir: The folder that holds it.
        val_fraction: Share of the training set that is kept apart and scored instead of the test set (0: none).
        lr: Highest learning rate.
        seed: Seed of weights, order and augmentation.
        threads: CPU threads (0: torch's choice).
        shift: Largest random shift, in pixels.
        state: File to go on from and to save to.
    """
    if threads:
        torch.set_num_threads(threads)
    print(json.dumps(train_cnn(dataset, data_dir, minutes, val_fraction, lr, seed, shift, state), indent=2))


if __name__ == '__main__':
    with guarded():
        tyro.cli(main, description=__doc__)
