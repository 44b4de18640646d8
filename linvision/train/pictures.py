"""Pictures for TensorBoard: what a model gets wrong, and what it attends to."""

from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from linvision.analysis.attention_map import attention_maps
from linvision.analysis.figure_text import literal
from linvision.data import Batches
from linvision.extras import needed
from linvision.models.linformer_vit import LinformerVisionTransformer
from linvision.models.padding import padded_pixels
from linvision.train.masked_pixels import mask_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TOKENS = 4096  # attention is written out for its picture


@torch.no_grad()
def misclassified(
    model: nn.Module, batches: Batches, img_size: int, classes: tuple[str, ...], n: int = 16
) -> 'Figure | None':
    """The first images of a set whose class the model gets wrong, with both names; None where there are none."""
    wrong: list[tuple[Tensor, str]] = []
    for images, labels in batches.ordered(img_size):
        guesses = model(images).argmax(-1)
        for i in ((guesses != labels) & (labels >= 0)).nonzero().flatten().tolist():
            wrong.append((images[i], f'{classes[labels[i]]}\nseen as {classes[guesses[i]]}'))
        if len(wrong) >= n:
            break
    return draw(wrong[:n]) if wrong else None


@torch.no_grad()
def attention(
    model: nn.Module, batches: Batches, img_size: int, classes: tuple[str, ...], n: int = 4
) -> 'Figure | None':
    """Images beside what the last block attends to; None for models of other kinds and for very long sequences."""
    if not isinstance(model, LinformerVisionTransformer) or model.patch_embed.num_patches > MAX_TOKENS:
        return None
    images, labels = next(batches.ordered(img_size))
    images, labels = images[labels >= 0], labels[labels >= 0]
    maps = attention_maps(model, images[:n])
    pairs = []
    for image, label, found in zip(images, labels, maps, strict=False):
        pairs += [(image, classes[label]), (found.unsqueeze(0), 'attention')]
    return draw(pairs)


@torch.no_grad()
def reconstructions(
    model: VisionTransformer,
    batches: Batches,
    img_size: int,
    classes: tuple[str, ...],
    ratio: float = 0.5,
    size: int = 4,
    n: int = 8,
) -> 'Figure | None':
    """Images, the same with hidden parts, and what the model makes of those."""
    images, _ = next(batches.ordered(img_size))
    images = images[:n]
    mask = mask_for(model, images, ratio, size, torch.arange(len(images), device=images.device))
    said = model(images, key_padding_mask=mask)[:, model.num_prefix_tokens :].float()
    patch, grid = model.patch_embed.patch_size, model.patch_embed.grid_size
    hidden = padded_pixels(mask, grid, patch)
    x = said.unflatten(1, grid).unflatten(3, (*patch, images.shape[1])).permute(0, 5, 1, 3, 2, 4)
    filled = torch.where(hidden, x.reshape(images.shape), images)
    rows = ((images, 'image'), (images.masked_fill(hidden, images.min()), 'seen'), (filled, 'told'))
    return draw([(image, title) for batch, title in rows for image in batch], columns=len(images))


def draw(pictures: list[tuple[Tensor, str]], columns: int = 8) -> 'Figure':
    """Pictures of (C, h, w), each stretched to its own range, with their titles."""
    with needed('A picture of a run'):
        from matplotlib.figure import Figure
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.6 * columns, 2.0 * rows), layout='constrained')
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for axis, (image, title) in zip(axes.flat, pictures, strict=False):
        image = image.float().cpu()
        image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-9)
        axis.imshow((image.permute(1, 2, 0) if len(image) == 3 else image[0]).numpy(), cmap='gray')
        axis.set_title(literal(title), fontsize=7)
    return figure
