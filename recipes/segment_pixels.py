"""A class for every pixel: the shipped backbone's features at full resolution, on scenes of overlapping clothes.

    linvision train segment_pixels --output-dir outputs/segment_pixels --data-dir data
    linvision train segment_pixels --network unet --output-dir outputs/segment_unet

A scene is a 64×64 canvas (4,096 tokens, one a pixel) with two to five Fashion-MNIST items, each from half to its whole
size, one over the other; scenes for training are made of training items, those for the score of test items, and scene i
is the same at every call. `features_only=True` gives one vector a pixel; a norm and a 3×3 convolution make classes of
it. `unet` is a small U-Net of equal size. Both have the same minutes. Scores mean IoU, without the background, on 500
scenes; writes `metrics.json`, `scenes.png` (image, truth, prediction) and `model.pt`. The same command goes on where a
run was stopped, from at most a minute before.

Result: mean IoU 53.5 % after 20 minutes on one CPU thread in bf16, the U-Net 70.6 % (one seed;
`python -m scripts.studies.run segmentation --precision bf16`). Not yet run on a GPU.

An example of your own loop around a backbone, in one file; the other recipes share the engine in `linvision.train`.
"""

import json
import os
import pickle
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
import tyro
from timm.layers import LayerNorm2d
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import Tensor, nn
from torchvision.transforms.v2 import Normalize

import linvision  # noqa: F401  (registers the models)
from linvision.data import Images, create_dataset, split_validation
from linvision.guard import end, guarded
from linvision.train.metrics import machine
from linvision.train.optimizer import FALLBACK, step_in_stacks
from linvision.train.parallel import choose_device

ITEM = 28  # pixels of an item's side
VISIBLE = 25  # of 255: darker pixels of an item are not its own
WARMUP = 0.05
# what torch and json raise for a file that is cut, or that no run wrote
DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError)


@dataclass
class Settings:
    """A run."""

    network: Literal['linformer', 'unet'] = 'linformer'
    """What is trained: the backbone with a convolution, or the U-Net."""
    backbone: str = 'linformer_vit_pico_patch1_32.fashion_mnist'
    """Name of the backbone, a timm name, `local-dir:…` or `hf-hub:…`."""
    pretrained: bool = True
    """Start from the backbone's weights."""
    minutes: float = 30.0
    """Minutes of training."""
    opt: str = 'muon'
    """Optimizer, by timm's name."""
    lr: float = 0.01
    """Highest learning rate."""
    precision: Literal['fp32', 'bf16'] = 'fp32'
    """bf16: matrix products and convolutions in bfloat16 (autocast)."""
    batch_size: int = 8
    """Scenes in a step."""
    canvas: int = 64
    """Side of a scene in pixels, a multiple of 4 from 28, the size of an item."""
    test_scenes: int = 500
    """Scenes that are scored."""
    validation: bool = False
    """Score scenes of 5 % of the training items, which are kept apart, to choose settings on."""
    data_dir: Path = Path('data')
    """Folder that holds Fashion-MNIST; it is fetched there."""
    output_dir: Path = Path('outputs/segment_pixels')
    """Folder for the results."""
    device: str = 'auto'
    """Torch device."""
    threads: int = 0
    """CPU threads (0: torch's choice)."""
    seed: int = 0
    """Seed of weights and training scenes."""


# -------------------------------------------------------------------------------------------------------------- scenes


def scene(items: Images, index: int, seed: int, canvas: int) -> tuple[Tensor, Tensor]:
    """Scene `index` of a seed: its pixels (1, canvas, canvas), 0..1, and the class of each, 0 for the background."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    pixels, classes = torch.zeros(1, canvas, canvas), torch.zeros(canvas, canvas, dtype=torch.int64)
    for _ in range(draw(2, 6)):
        i, side = draw(0, len(items)), draw(ITEM // 2, ITEM + 1)
        item = F.interpolate(items.images[i][None].float(), size=(side, side), mode='area')[0]
        top, left = draw(0, canvas - side + 1), draw(0, canvas - side + 1)
        place = (slice(top, top + side), slice(left, left + side))
        own = item[0] > VISIBLE
        pixels[:, place[0], place[1]] = torch.where(own, item / 255, pixels[:, place[0], place[1]])
        classes[place] = torch.where(own, items.labels[i] + 1, classes[place])
    return pixels, classes


def scenes(items: Images, first: int, count: int, seed: int, canvas: int) -> tuple[Tensor, Tensor]:
    """A batch of scenes, (B, 1, canvas, canvas) and (B, canvas, canvas)."""
    pixels, classes = zip(*(scene(items, first + i, seed, canvas) for i in range(count)), strict=True)
    return torch.stack(pixels), torch.stack(classes)


# ------------------------------------------------------------------------------------------------------------ networks


class PixelClassifier(nn.Module):
    """A backbone's last features, one vector a pixel, and a 3×3 convolution over them.

    On a canvas of twice the size that the backbone was trained at, its own convolutions are spread to every other
    pixel, so that with a layer that looks at one pixel at a time the classes come out as a chequerboard.

    Args:
        backbone: Name of the backbone.
        pretrained: Start from its weights.
        canvas: Side of the images.
        num_classes: Classes.
    """

    def __init__(self, backbone: str, pretrained: bool, canvas: int, num_classes: int) -> None:
        super().__init__()
        self.features = timm.create_model(
            backbone, pretrained=pretrained, features_only=True, out_indices=(-1,), img_size=canvas, in_chans=1
        )
        width = self.features.feature_info.channels()[-1]
        self.head = nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, num_classes, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, h, w) -> logits (B, num_classes, h, w), interpolated where a token is more than a pixel."""
        logits = self.head(self.features(x)[-1])
        return logits if logits.shape[-2:] == x.shape[-2:] else F.interpolate(logits, x.shape[-2:], mode='bilinear')


class UNet(nn.Module):
    """Two levels down, two up, two 3×3 convolutions at each: 203,690 parameters with eleven classes.

    Args:
        num_classes: Classes.
        width: Channels at full resolution.
    """

    def __init__(self, num_classes: int, width: int = 21) -> None:
        super().__init__()

        def level(before: int, after: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for channels in (before, after):
                layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList([level(1, width), level(width, 2 * width), level(2 * width, 4 * width)])
        self.up = nn.ModuleList([level(6 * width, 2 * width), level(3 * width, width)])
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, h, w) -> logits (B, num_classes, h, w)."""
        full = self.down[0](x)
        half = self.down[1](F.max_pool2d(full, 2))
        x = self.down[2](F.max_pool2d(half, 2))
        for level, skip in zip(self.up, (half, full), strict=True):
            x = level(torch.cat([F.interpolate(x, scale_factor=2.0, mode='nearest'), skip], dim=1))
        return self.head(x)


# ------------------------------------------------------------------------------------------------- training and scoring


def network(settings: Settings, num_classes: int) -> nn.Module:
    """What is trained, from pixels in 0..1 to logits."""
    if settings.network == 'unet':
        return UNet(num_classes)
    return PixelClassifier(settings.backbone, settings.pretrained, settings.canvas, num_classes)


def create_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """timm's; Muon takes the matrices within the network, AdamW what is no such matrix, as in `linvision.train`."""
    others = partial(param_groups_weight_decay, weight_decay=0.0, fallback_list=[f'*.{name}' for name in FALLBACK])
    optimizer = create_optimizer_v2(model, settings.opt, lr=settings.lr, param_group_fn=others)
    if settings.opt == 'muon':
        step_in_stacks(optimizer, settings.precision == 'fp32' and next(model.parameters()).device.type == 'cpu')
    return optimizer


def train(model: nn.Module, items: Images, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Train for the minutes of the settings, with a checkpoint every minute, from the last one on."""
    optimizer = create_optimizer(model, settings)
    file, at = settings.output_dir / 'checkpoint.pt', {'step': 0, 'seconds': 0.0}
    if file.is_file():
        try:
            saved = torch.load(file, map_location=device, weights_only=True)
            model.load_state_dict(saved['model'])
            optimizer.load_state_dict(saved['optimizer'])
            at = {'step': int(saved['at']['step']), 'seconds': float(saved['at']['seconds'])}
        except DAMAGE as error:
            end(f'{file} is damaged ({type(error).__name__}). Move it away, and the same command starts over.')
        print(f'goes on from step {at["step"]}, {at["seconds"] / 60:.1f} minutes', flush=True)
    model.train()
    saved_at, began = at['seconds'], time.perf_counter() - at['seconds']
    while (progress := at['seconds'] / (60 * settings.minutes)) < 1:
        for group in optimizer.param_groups:  # up in a line, then down in a line
            group['lr'] = settings.lr * min(progress / WARMUP, (1 - progress) / (1 - WARMUP))
        first = at['step'] * settings.batch_size
        pixels, classes = scenes(items, first, settings.batch_size, settings.seed + 1, settings.canvas)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == 'bf16'):
            logits = model(pixels.to(device))
        loss = F.cross_entropy(logits.float(), classes.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        at = {'step': at['step'] + 1, 'seconds': time.perf_counter() - began}
        if at['seconds'] - saved_at > 60:
            saved_at = at['seconds']
            torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'at': at}, f'{file}.part')
            os.replace(f'{file}.part', file)
            print(f'step {at["step"]}  {100 * progress:.0f} %  loss {loss.item():.3f}', flush=True)
    return {'scenes_seen': at['step'] * settings.batch_size, 'train_minutes': at['seconds'] / 60}


@torch.no_grad()
def predict(model: nn.Module, pixels: Tensor, device: torch.device) -> Tensor:
    """The likeliest class of each pixel, (B, h, w)."""
    return model.eval()(pixels.to(device)).argmax(1).cpu()


def intersection_over_union(confusion: Tensor) -> Tensor:
    """IoU of each class from how often each truth (row) was said to be each class (column)."""
    hits = confusion.diagonal()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits).clamp(min=1)


def score(model: nn.Module, items: Images, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Mean IoU of the classes but the background, and accuracy of all pixels, on scenes of other items."""
    n = len(items.classes) + 1
    confusion = torch.zeros(n, n, dtype=torch.float64)
    for first in range(0, settings.test_scenes, 20):
        count = min(20, settings.test_scenes - first)
        pixels, truth = scenes(items, first, count, 0, settings.canvas)
        found = predict(model, pixels, device)
        confusion += torch.bincount((truth * n + found).flatten(), minlength=n * n).view(n, n)
    iou = intersection_over_union(confusion)
    names = dict(zip(items.classes, iou[1:].tolist(), strict=True))
    accuracy = (confusion.diagonal().sum() / confusion.sum()).item()
    return {'mean_iou': iou[1:].mean().item(), 'pixel_accuracy': accuracy, 'iou': names}


def draw(model: nn.Module, items: Images, settings: Settings, device: torch.device, path: Path, count: int = 6) -> None:
    """Scenes as they are, their classes, and the classes that the model says."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    pixels, truth = scenes(items, 0, count, 0, settings.canvas)
    rows = {'image': pixels[:, 0], 'truth': truth, 'said': predict(model, pixels, device)}
    figure = Figure(figsize=(1.9 * count, 6.6), layout='constrained')
    axes = figure.subplots(3, count)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        colours = {'cmap': 'gray'} if name == 'image' else {'cmap': 'tab20', 'vmin': 0, 'vmax': 19}
        for axis, values in zip(line, pictures, strict=True):
            image = axis.imshow(values.numpy(), interpolation='nearest', **colours)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name)
    patches = [Patch(color=image.cmap(image.norm(i + 1)), label=name) for i, name in enumerate(items.classes)]
    figure.legend(handles=patches, loc='outside lower center', ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)


def read(file: Path) -> dict[str, Any]:
    """What a run wrote as JSON."""
    try:
        return dict(json.loads(file.read_text()))
    except (*DAMAGE, RecursionError) as error:
        end(f'{file} is damaged ({type(error).__name__}). Move it away, or choose another --output-dir.')


def main(settings: Settings) -> dict[str, Any]:
    """Train, score and draw; the contents of `metrics.json`."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.canvas < ITEM or settings.canvas % 4:
        end(f'canvas must be a multiple of 4, and {ITEM} pixels at least, got {settings.canvas}.')
    folder, device = settings.output_dir, choose_device(settings.device)
    own = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / 'settings.json').is_file() and read(folder / 'settings.json') != own:
        end(f'{folder} holds a run with other settings: choose another --output-dir.')
    if (folder / 'metrics.json').is_file():
        print(f'{folder} holds this run, finished')
        return read(folder / 'metrics.json')
    (folder / 'settings.json').write_text(json.dumps(own, indent=2) + '\n')
    items, test_items = (create_dataset('fashion_mnist', settings.data_dir, split) for split in ('train', 'test'))
    if settings.validation:
        items, test_items = split_validation(items, 0.05, settings.seed)
    torch.manual_seed(settings.seed)
    normalise = Normalize(*items.statistics())  # as the backbone was trained to see images
    model = nn.Sequential(normalise, network(settings, len(items.classes) + 1)).to(device)
    trained = train(model, items, settings, device)
    torch.save(model.state_dict(), folder / 'model.pt')
    metrics = {**score(model, test_items, settings, device), **trained, 'settings': own, **machine(device)}
    metrics['num_parameters'] = sum(p.numel() for p in model.parameters())
    (folder / 'metrics.json').write_text(json.dumps(metrics, indent=2) + '\n')
    draw(model, test_items, settings, device, folder / 'scenes.png')  # last: it may fail
    print(f'mean IoU {100 * metrics["mean_iou"]:.1f} %, {metrics["num_parameters"]:,} parameters, {folder}')
    return metrics


def command() -> None:
    """Train by the command line's flags."""
    with guarded():
        main(tyro.cli(Settings, description=__doc__))


if __name__ == '__main__':
    command()
