"""What is in a model, as pictures: what it attends to, the rows of its projection, how alike its positions are.

    linvision visualize outputs/demo IMAGE_OR_FOLDER... --output-dir outputs/pictures
    linvision visualize linformer_vit_pico_patch1_32.fashion_mnist my_photo.jpg

Writes, as PNG files and into TensorBoard (`tensorboard --logdir outputs/pictures`):

- `attention_blocks`: each image and the attention of each block, the mean over heads and queries;
- `attention_heads`: the heads of one block (`--block`), the mean over queries, and for the token in the middle;
- `projection`: rows of E as pictures: with which weight each token enters a row;
- `positions`: cosine similarity of some tokens' position embeddings with all others, where there are such.

Attention is lifted from K rows to the image by E: signed, not normalised, and no probability over tokens. Maps of a
barely trained model look alike from image to image: they show E, which has not learnt yet.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from timm.data import resolve_model_data_config
from torch import Tensor

from linvision.analysis.attention_map import attention_maps, projection_matrices, tokens_of_images
from linvision.analysis.figure_text import literal
from linvision.cli.images import caption, class_names, find_images, short
from linvision.cli.pretrained import load_vit
from linvision.data.image_file import read_image
from linvision.data.timm_transform import changed, timm_transform
from linvision.meter import Meter
from linvision.models.linformer_vit import LinformerVisionTransformer
from linvision.models.position import SeparablePosition

ALIKE = 0.95  # correlation of two maps
SIGNED = 'the weight of each token, lifted from K rows by E: signed, not normalised; red above zero, blue below'
Panel = tuple[Tensor, str, bool]  # what is drawn, (h, w) or (h, w, 3), its title, and whether it is signed


def picture(title: str, panels: list[list[Panel]]) -> Any:
    """A figure with a row of panels for each list; each panel is stretched to its own range."""
    from matplotlib.figure import Figure

    columns = max(len(row) for row in panels)
    figure = Figure(figsize=(max(1.5 * columns, 7.0), 1.7 * len(panels) + 0.6), layout='constrained')
    figure.suptitle(literal(title), fontsize=9, wrap=True)
    for axes, row in zip(figure.subplots(len(panels), columns, squeeze=False), panels, strict=True):
        for axis in axes:
            axis.axis('off')
        for axis, (values, name, signed) in zip(axes, row, strict=False):
            limit = values.abs().max().clamp(min=1e-12).item()
            range_ = {'vmin': -limit, 'vmax': limit, 'cmap': 'RdBu_r'} if signed else {'cmap': 'gray'}
            axis.imshow(values.numpy(), interpolation='nearest', **range_)
            axis.set_title(literal(name), fontsize=7)
    return figure


def shown(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised images as they are looked at: (B, C, height, width) -> (B, height, width[, 3]) in 0..1."""
    pixels = images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    return pixels.clamp(0, 1).permute(0, 2, 3, 1).squeeze(-1)


@torch.no_grad()
def titles(model: Any, images: Tensor, paths: list[Path]) -> list[str]:
    """The name of each image and, of a model with classes, the likeliest."""
    if not model.num_classes:
        return [short(path) for path in paths]
    classes, best = class_names(model), model(images).softmax(-1).max(-1)
    found = zip(paths, best.indices.tolist(), best.values.tolist(), strict=True)
    return [caption(path, classes[label], probability) for path, label, probability in found]


def are_alike(maps: list[Tensor]) -> bool:
    """Whether the attention of all blocks and images looks the same, but for scale and mean: (B, h, w) a block."""
    flat = torch.cat(maps).flatten(1)
    flat = F.normalize(flat - flat.mean(1, keepdim=True), dim=1)
    return (flat @ flat.T).abs().min().item() > ALIKE


def attention_of_blocks(maps: list[Tensor], names: list[str], looks: Tensor) -> Any:
    """Each image and the attention of each block."""
    rows = [
        [(looks[i], name, False), *((m[i], f'block {b}', True) for b, m in enumerate(maps))]
        for i, name in enumerate(names)
    ]
    return picture(f'Attention by block, mean over heads and queries: {SIGNED}', rows)


def attention_of_heads(
    model: LinformerVisionTransformer, images: Tensor, names: list[str], looks: Tensor, block: int
) -> Any:
    """Each image and the attention of each head of a block, of all tokens and of the one in the middle."""
    middle = tuple(n // 2 for n in model.patch_embed.grid_size)
    whole, one = (attention_maps(model, images, block, query, per_head=True) for query in (None, middle))
    rows = []
    for i, name in enumerate(names):
        heads = [
            (m[i, h], f'head {h}, {who}', True)
            for m, who in ((whole, 'all'), (one, 'middle'))
            for h in range(m.shape[1])
        ]
        rows.append([(looks[i], name, False), *heads])
    which = block % len(model.blocks)
    return picture(f'Attention of block {which} by head, of all tokens and of the one in the middle: {SIGNED}', rows)


def projection_rows(model: LinformerVisionTransformer, images: Tensor, block: int, count: int = 64) -> Any:
    """Rows of the E of a block that does not run full attention, of the first image where each has its own."""
    assert model.projection is not None, 'a block without E runs full attention'
    grid = model.patch_embed.grid_size
    _, matrix = projection_matrices(model, block, tokens_of_images(model, images[:1], block))
    matrix = matrix.reshape(-1, *matrix.shape[-2:])[0]  # of the first head
    rows = [(row.detach().unflatten(-1, grid), f'row {k}', True) for k, row in enumerate(matrix[:count])]
    title = (
        f'The first {len(rows)} of {len(matrix)} rows of E ({model.projection.extra_repr()}): with which weight each '
        'token enters a row; red above zero, blue below'
    )
    return picture(title, [rows[i : i + 8] for i in range(0, len(rows), 8)])


def position_table(model: LinformerVisionTransformer) -> Tensor | None:
    """The embedding of each place, (N, D); None where positions come from a convolution."""
    if model.pos_embed is not None:
        table = model.pos_embed[0]
        return table[table.shape[0] - model.patch_embed.num_patches :]
    if isinstance(model.position, SeparablePosition):
        return (model.position.row[0].unsqueeze(1) + model.position.column[0].unsqueeze(0)).flatten(0, 1)
    return None


@torch.no_grad()
def position_similarity(table: Tensor, grid: tuple[int, int], side: int = 4) -> Any:
    """Similarity of some tokens' positions with all others, each in its own place."""
    alike = F.normalize(table, dim=-1)
    rows = []
    for i in range(side):
        places = [(grid[0] * (2 * i + 1) // (2 * side), grid[1] * (2 * j + 1) // (2 * side)) for j in range(side)]
        rows.append(
            [((alike @ alike[r * grid[1] + c]).unflatten(-1, grid), f'row {r}, column {c}', True) for r, c in places]
        )
    return picture('Cosine similarity of the position embedding of one token with those of all; red 1, blue −1', rows)


def main(
    model: tyro.conf.Positional[str],
    images: tyro.conf.Positional[list[Path]],
    output_dir: Path = Path('outputs/pictures'),
    block: int = -1,
    limit: int = 6,
) -> None:
    """Draw a model.

    Args:
        model: Folder of a run or a model, `hf-hub:OWNER/MODEL`, or a name with weights.
        images: Image files, or folders of them.
        output_dir: Folder for PNG files and TensorBoard's events.
        block: Whose heads and whose E are drawn; negative numbers count from the last.
        limit: How many images at most, 0 for all.
    """
    from torch.utils.tensorboard import SummaryWriter

    net = load_vit(model, None, 0)
    if not isinstance(net, LinformerVisionTransformer):
        raise ValueError(
            f"Pictures are of linformer_vit_* models, got {type(net).__name__}: see timm's AttentionExtract."
        )
    if not -len(net.blocks) <= block < len(net.blocks):
        raise ValueError(f'block must be one of the {len(net.blocks)} that the model has, from 0, got {block}.')
    config = resolve_model_data_config(net)
    transform = timm_transform(**config)
    paths = find_images(images)[: limit or None]
    batch = torch.stack([changed(transform, read_image(path, net.in_chans), path) for path in paths])
    looks, names = shown(batch, config['mean'], config['std']), titles(net, batch, paths)
    maps = [attention_maps(net, batch, i) for i in range(len(net.blocks))]
    figures: dict[str, Callable[[], Any]] = {
        'attention_blocks': lambda: attention_of_blocks(maps, names, looks),
        'attention_heads': lambda: attention_of_heads(net, batch, names, looks, block),
    }
    if not net.blocks[block].attn.is_full(net.patch_embed.grid_size):
        figures['projection'] = lambda: projection_rows(net, batch, block)
    if (table := position_table(net)) is not None:
        figures['positions'] = lambda: position_similarity(table, net.patch_embed.grid_size)
    output_dir.mkdir(parents=True, exist_ok=True)
    with SummaryWriter(output_dir) as writer, Meter('drawing', len(figures), 'pictures') as meter:
        for i, (name, draw) in enumerate(figures.items()):
            meter.at(i)
            figure = draw()
            figure.savefig(output_dir / f'{name}.png', dpi=110)
            writer.add_figure(name, figure)
            meter.say(str(output_dir / f'{name}.png'))
        if are_alike(maps):
            meter.say('All maps are alike: they show the projection E, and that the model has learnt little yet.')
