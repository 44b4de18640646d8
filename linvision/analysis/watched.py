"""What layers read and give while a model runs."""

from collections.abc import Iterable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


@torch.no_grad()
def watched(model: VisionTransformer, layers: Iterable[Any], images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """First input and output of some layers, in eval mode and without gradients, in the order in which they run."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [layer.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out))) for layer in layers]
    training = model.training
    try:
        model.eval().forward_features(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return seen
