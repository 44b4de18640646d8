"""Scores of a model on a set, every image counted exactly once, over any number of processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from timm.task import ClassificationEvaluator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from linvision.data import Batches
from linvision.train.precision import autocast


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in eval mode without gradients, and then as it was."""
    training = model.training
    model.eval()
    with torch.no_grad():  # not inference_mode, which FSDP cannot use
        yield
    model.train(training)
    if isinstance(model, FSDPModule):
        model.reshard()  # FSDP leaves the root whole after a forward pass


def evaluate(model: nn.Module, batches: Batches, img_size: int, precision: str = 'fp32') -> dict[str, float]:
    """Loss and accuracy.

    Args:
        model: Model in any mode; it is evaluated in eval mode and left in its own.
        batches: The set; where processes share it, each gives its own part, and all must call this together.
        img_size: Size of the images that the model sees.
        precision: Precision of the forward pass.

    Returns:
        `top1` and, with more than five classes, `top5` as fractions, `loss` (cross-entropy, mean over images),
        `num_samples`, and `num_left_out`, how many of the set could not be read.
    """
    order, device = batches.order, batches.preparation.device
    evaluator, images_scored = ClassificationEvaluator(device=device), torch.zeros((), dtype=torch.int64, device=device)
    steps = -(-order.n // order.batch_size)
    silent = None if order.rank == 0 else True  # None: only on a terminal
    with evaluating(model):
        for images, labels in tqdm(batches.ordered(img_size), 'scoring', steps, leave=False, disable=silent):
            with autocast(images.device, precision):
                logits = model(images)
            counted = labels >= 0
            evaluator.update(logits[counted].float(), labels[counted])
            images_scored += counted.sum()
    scores = evaluator.compute(distributed=order.count > 1)
    if order.count > 1:
        dist.all_reduce(images_scored)
    return {
        'top1': scores['top1'] / 100,
        **({'top5': scores['top5'] / 100} if logits.shape[1] > 5 else {}),
        'loss': scores['loss'],
        'num_samples': int(images_scored),
        'num_left_out': order.n - int(images_scored) + batches.absent,
    }
