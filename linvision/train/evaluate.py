"""Scores of a model on a set, every image counted exactly once, over any number of processes."""

import torch
from timm.task import ClassificationEvaluator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from linvision.data import DeviceBatches
from linvision.train.precision import autocast


@torch.no_grad()  # not inference_mode, which FSDP cannot use
def evaluate(model: nn.Module, batches: DeviceBatches, img_size: int, precision: str = 'fp32') -> dict[str, float]:
    """Loss and accuracy.

    Args:
        model: Model in any mode; it is evaluated in eval mode and left in its own.
        batches: The set; where processes share it, each gives its own part, and all must call this together.
        img_size: Size of the images that the model sees.
        precision: Precision of the forward pass.

    Returns:
        `top1` and `top5` as fractions, `loss` (cross-entropy, mean over images) and `num_samples`.
    """
    training = model.training
    model.eval()
    evaluator = ClassificationEvaluator(device=batches.labels.device, max_samples=batches.num_valid)
    steps = -(-len(batches.labels) // batches.batch_size)
    silent = None if batches.rank == 0 else True  # None: only on a terminal
    bar = tqdm(batches.ordered(img_size), 'scoring', steps, leave=False, disable=silent)
    for images, labels in bar:
        with autocast(images.device, precision):
            logits = model(images)
        evaluator.update(logits.float(), labels)
    model.train(training)
    if isinstance(model, FSDPModule):
        model.reshard()  # FSDP leaves the root whole after a forward pass
    scores = evaluator.compute(distributed=batches.count > 1)
    return {
        'top1': scores['top1'] / 100,
        'top5': scores['top5'] / 100,
        'loss': scores['loss'],
        'num_samples': len(batches.labels),
    }
