"""Scores of a model on a set, every image counted exactly once, over any number of processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from linvision.data import Batches
from linvision.meter import counted
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


def scoring(batches: Batches, img_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a set in order, of which the first process shows how many are scored."""
    order = batches.order
    return counted(batches.ordered(img_size), 'scoring', order.n, 'images', order.batch_size, order.rank == 0)


def score_words(scores: dict[str, Any]) -> str:
    """Scores as a person reads them."""
    words = [f'{label} {100 * scores[k]:.2f} %' for k, label in (('top1', 'top-1'), ('top5', 'top-5')) if k in scores]
    words += [f'loss {scores["loss"]:.4f}', f'{scores["num_samples"]:,} images']
    if scores.get('num_left_out'):
        words.append(f'{scores["num_left_out"]:,} could not be read and are left out')
    return ', '.join(words)


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
    # sums stay on the device: to read one, or to leave images out by an index, would wait for each batch
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # images, right at first, right among five
    loss = torch.zeros((), dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)
    with evaluating(model):
        for images, labels in scoring(batches, img_size):
            with autocast(images.device, precision):
                logits = model(images)
            loss += F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction='sum')
            right = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)  # no guess is -1
            counts += torch.stack([(labels >= 0).sum(), right[:, 0].sum(), right.sum()])
    if order.count > 1:
        dist.all_reduce(counts)
        dist.all_reduce(loss)
        sharing = dist.get_world_size() // order.count  # processes that share an image: each has counted it
        counts, loss = counts // sharing, loss / sharing
    scored, first, among_five = counts.tolist()
    return {
        'top1': first / max(scored, 1),
        **({'top5': among_five / max(scored, 1)} if logits.shape[1] > 5 else {}),
        'loss': float(loss) / max(scored, 1),
        'num_samples': scored,
        'num_left_out': order.n - scored + batches.absent,
    }
