"""Self-pretraining by masked pixels: parts of an image are hidden, and the model tells their pixels from the rest.

As in SimMIM (arXiv 2111.09886), on the images of the task itself (arXiv 2310.02980), with one linear layer over the
tokens as decoder: the model's own head, over every token instead of their mean. Hidden tokens stand where padding
would: they ask, but nothing reads them (as in the decoder of CrossMAE, arXiv 2401.14391), so that no pixel of theirs
can leak, and E needs no learned stand-in for them.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor

from linvision.data import Batches
from linvision.data.keyed import uniform
from linvision.models.linformer_vit import LinformerVisionTransformer
from linvision.train.evaluate import evaluating, scoring
from linvision.train.precision import autocast


def adapt(model: VisionTransformer) -> None:
    """Let the head tell pixels from each token, instead of classes from their mean.

    Raises:
        ValueError: The model cannot hide tokens.
    """
    if not isinstance(model, LinformerVisionTransformer):
        raise ValueError(
            f'masked_pixels hides tokens, which only linformer_vit_* models can; got {type(model).__name__}. '
            "(--model-args projection none is a plain ViT's attention.)"
        )
    pixels = model.patch_embed.patch_size[0] * model.patch_embed.patch_size[1] * model.in_chans
    # of the backbone that a run exports; nn.Module takes any attribute, but declares tensors and modules alone
    model.usual_pool = model.global_pool  # type: ignore[assignment]
    model.reset_classifier(pixels, '')
    model.looks_at_padding = False  # the masks are ours, and a look waits for the device


def hidden_tokens(draws: Tensor, grid: tuple[int, int], ratio: float, cell: int) -> Tensor:
    """Which tokens are hidden: (B, N), boolean, the same number of cells in each image.

    Args:
        draws: Random numbers, (B, at least as many as there are cells).
        grid: Tokens along each axis.
        ratio: Share of the cells that is hidden; at least one is, and one is not.
        cell: Side of a cell in tokens.

    Raises:
        ValueError: There is one cell only.
    """
    height, width = (-(-n // cell) for n in grid)
    n = min(max(1, round(ratio * height * width)), height * width - 1)
    if n < 1:
        raise ValueError(f'mask_size leaves one cell on a grid of {grid[0]}×{grid[1]} tokens: choose a smaller one.')
    cells = (draws[:, : height * width].argsort(dim=1) < n).unflatten(1, (height, width))
    return cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, : grid[0], : grid[1]].flatten(1)


def patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """The pixels of each token: (B, C, h·p, w·q) -> (B, h·w, p·q·C)."""
    B, C, height, width = images.shape
    x = images.reshape(B, C, height // patch[0], patch[0], width // patch[1], patch[1])
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def mask_for(model: VisionTransformer, images: Tensor, ratio: float, size: int, places: Tensor | None = None) -> Tensor:
    """Hidden tokens for a batch, drawn on its device.

    Those of a step follow from `torch.manual_seed`, which the loop calls with seed, step and process.

    Args:
        model: The model, for its token grid.
        images: (B, C, height, width).
        ratio, size: As for `MaskedPixelsTask`.
        places: Positions of the images in their set, (B), which decide what is hidden; at random by default.
    """
    grid, device = model.patch_embed.grid_size, images.device
    N = grid[0] * grid[1]
    draws = torch.rand(len(images), N, device=device) if places is None else uniform(0, places, N)
    return hidden_tokens(draws, grid, ratio, max(1, size // model.patch_embed.patch_size[0]))


def reconstruction_loss(model: VisionTransformer, output: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the hidden, normalised pixels.

    Args:
        model: The model, for its patch size.
        output: What the head says of each token, (B, P + N, p·q·C).
        images: (B, C, height, width).
        mask: Hidden tokens, (B, N).
    """
    return hidden_errors(model, output, images, mask).sum() / mask.sum()


def hidden_errors(model: VisionTransformer, output: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Squared error of each hidden token, and zero of the others: (B, N). An index by the mask would wait for it."""
    said = output[:, model.num_prefix_tokens :].float()
    errors = (said - patches(images, model.patch_embed.patch_size)).square().mean(-1)
    return errors.masked_fill(~mask, 0.0)


class MaskedPixelsTask(ClassificationTask):
    """timm's task, with hidden pixels in the place of labels.

    Args:
        model: The model, adapted.
        ratio: Share of the image that is hidden.
        size: Side of what is hidden together, in pixels.
        arguments: Those of timm's task.
    """

    def __init__(self, model: VisionTransformer, ratio: float, size: int, **arguments: Any) -> None:
        super().__init__(model, **arguments)
        self.ratio, self.size = ratio, size

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of a batch, and what the head says; labels are not looked at."""
        model = unwrap_model(self.trainable_module)
        mask = mask_for(model, input, self.ratio, self.size)
        output = self.trainable_module(input, key_padding_mask=mask)
        return {'loss': reconstruction_loss(model, output, input, mask), 'output': output}


def evaluate_masked(
    model: VisionTransformer, batches: Batches, img_size: int, ratio: float, size: int, precision: str = 'fp32'
) -> dict[str, float]:
    """Mean loss on a set, each image hidden in the same way at every call.

    Args:
        model: The model, adapted; left in its mode.
        batches: The set; all processes call this together.
        img_size: Size of the images.
        ratio: Share of the image that is hidden.
        size: Side of what is hidden together, in pixels.
        precision: Precision of the forward pass.

    Returns:
        `loss` (mean over images), `num_samples`, and `num_left_out`, how many of the set could not be read.
    """
    order, device, position = batches.order, batches.preparation.device, 0
    total = torch.zeros(2, device=device, dtype=torch.float32 if device.type == 'mps' else torch.float64)
    with evaluating(model):
        for images, labels in scoring(batches, img_size):
            places = (torch.arange(len(images), device=device) + position) * order.count + order.rank  # in the set
            position += len(images)
            mask = mask_for(model, images, ratio, size, places)
            with autocast(images.device, precision):
                output = model(images, key_padding_mask=mask)
            losses = hidden_errors(model, output, images, mask).sum(1) / mask.sum(1)
            counted = labels >= 0
            total += torch.stack([losses.masked_fill(~counted, 0.0).sum(), counted.sum()])
    if order.count > 1:
        torch.distributed.all_reduce(total)
    n = int(total[1])
    return {'loss': total[0].item() / max(n, 1), 'num_samples': n, 'num_left_out': order.n - n + batches.absent}
