"""What a fixed and a seeing E look at, side by side: two models that differ in E alone, and four photographs.

    python -m scripts.studies.run attended

Both are trained by `recipes/cifar10_pixels_pico.py` with patches of 2×2 pixels (256 tokens, K = 16), for equally many
images, one seed. Counted over some test images, for the last block: how far the rows of E differ from image to image
(`difference_between_images`), and how alike what the middle token attends to is. Writes `results/attended.json`, its
table in `docs/concepts/attended.md`, and the picture of the first images of four classes.
"""

from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from linvision.analysis import attention_maps, difference_between_images, projection_matrices, tokens_of_images
from linvision.data.batches import in_memory
from linvision.data.datasets import create_dataset, part
from linvision.train.metrics import machine
from scripts.studies.tables import DOCS, Rows, publish, table
from scripts.studies.trials import Flags, Trials, run_folder

RECIPE, SEEN, LAST = 'cifar10_pixels_pico', 100, -1
KINDS = {'separable': 'fixed', 'dynamic': 'seeing'}
SHOWN = (0, 3, 7, 9)  # classes: a plane, a cat, a horse, a lorry
ROWS = 3  # of E, in the picture


@dataclass
class Settings(Flags):
    """What the study can be asked.

    Args:
        epochs: Epochs of each run.
    """

    epochs: float = 1.0


@torch.no_grad()
def look(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of E of each image, (B, K, N), and what the middle token attends to, (B, h, w)."""
    block = len(model.blocks) + LAST
    _, E = projection_matrices(model, block, tokens_of_images(model, images, block))
    grid = model.patch_embed.grid_size
    maps = attention_maps(model, images, block, query=(grid[0] // 2, grid[1] // 2))
    return E if E.ndim == 3 else E.expand(len(images), -1, -1), maps


def likeness(maps: Tensor) -> float:
    """Mean correlation of the maps of two images, over all pairs: (B, h, w), B at least 2."""
    flat = maps.flatten(1)
    flat = F.normalize(flat - flat.mean(1, keepdim=True), dim=1)
    alike = flat @ flat.T
    return ((alike.sum() - alike.trace()) / (alike.numel() - len(alike))).item()


def most_different(E: Tensor) -> Tensor:
    """The rows that differ most from image to image; where none do, the largest."""
    spread = E.std(0).sum(-1)
    return (spread if spread.max() > 1e-6 else E[0].norm(dim=-1)).topk(ROWS).indices.sort().values


def draw(looks: Tensor, found: dict[str, tuple[Tensor, Tensor]], grid: tuple[int, int]) -> None:
    """A line for each photograph: the photograph, then of each model some rows of E and what a token attends to."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.4), layout='constrained')
    axes = figure.subplots(len(looks), 1 + len(KINDS) * (ROWS + 1))
    for axis in axes.flat:
        axis.axis('off')
    for line, photograph in zip(axes, looks, strict=True):
        line[0].imshow(photograph.permute(1, 2, 0).numpy())
    for i, (kind, (E, maps)) in enumerate(found.items()):
        first, chosen = 1 + i * (ROWS + 1), most_different(E).tolist()
        for image, line in enumerate(axes):
            panels = [*(E[image, k].unflatten(0, grid) for k in chosen), maps[image]]
            for axis, panel in zip(line[first:], panels, strict=False):
                limit = panel.abs().max().item()
                axis.imshow(panel.numpy(), cmap='RdBu_r', vmin=-limit, vmax=limit)
        for axis, k in zip(axes[0][first:], chosen, strict=False):
            axis.set_title(f'{KINDS[kind]} E, row {k}', fontsize=8)
        axes[0][first + ROWS].set_title('attended', fontsize=8)
        for line in axes:  # the token that asks
            line[first + ROWS].plot(grid[1] // 2, grid[0] // 2, 'kx', markersize=5)
    figure.savefig(DOCS / 'images' / 'attended.png', dpi=110)


def attended(settings: Settings) -> None:
    """What a fixed and a seeing E look at: how alike it is from photograph to photograph, and a picture of it."""
    trials = Trials('attended', settings)
    common = {'model': 'linformer_vit_pico_patch2_32', 'stages': ((32, 1.0),), 'max_minutes': 0.0}
    variants = {
        kind: {**common, 'epochs': settings.epochs, 'model_args': {'projection': kind, 'proj_len': 16}}
        for kind in KINDS
    }
    scores = trials.run(RECIPE, variants)
    images = in_memory(part(create_dataset('cifar10', settings.data_dir, 'test'), SEEN))
    shown = [images.labels.tolist().index(label) for label in SHOWN]
    rows: Rows = {}
    pictured: dict[str, tuple[Tensor, Tensor]] = {}
    for kind in KINDS:
        model: Any = timm.create_model(f'local-dir:{run_folder(trials.folder, kind, 0) / "model"}', pretrained=True)
        mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
        E, maps = look(model.eval(), (images.images / 255 - mean) / std)
        (run,) = scores[kind]
        counted = {'difference': difference_between_images(E), 'likeness': likeness(maps)}
        rows[kind] = [run | {k: round(v, 4) for k, v in counted.items()}]
        pictured[kind] = (E[shown], maps[shown])
    draw(images.images[shown], pictured, model.patch_embed.grid_size)
    columns = {
        'E': lambda key, _: f'{KINDS[key]} (`{key}`)',
        'rows differ between images': lambda key, rows: f'{rows[key][0]["difference"]:.2f}',
        'maps of two images correlate': lambda key, rows: f'{rows[key][0]["likeness"]:.2f}',
        'top-1': None,
        'parameters': None,
    }
    result = {'epochs': settings.epochs, 'images': SEEN, **machine(torch.device('cpu')), 'runs': rows}
    publish('attended', result, table(columns, rows), 'concepts/attended.md')
