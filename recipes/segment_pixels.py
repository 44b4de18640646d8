"""A class for every pixel: a U-Net with a Linformer ViT at its lowest level, on scenes of things.

    linvision train segment_pixels --output-dir outputs/segment_pixels --data-dir data
    linvision train segment_pixels --network unet --output-dir outputs/segment_unet

Scenes are made of a set's training images, or of its test images for the score; scene i is the same at every call.
There are three kinds:

- `clothes`: two to five items of Fashion-MNIST on 64×64 pixels, each from half to its whole size, one over the other.
- `objects`: as many images of CIFAR-10, cut to discs, on grey.
- `corners`: 128×128 pixels, with a trouser or a bag in the first corner and in the last, and another item in the
  middle: its class is that of the pair, one of four, whatever it looks like. The corners themselves are background.

The network is a U-Net of three levels. To its lowest, at a quarter of the resolution, the first two blocks of the
shipped backbone are added, by `features_only=True`: tokens that see all of the image. `unet` has wider convolutions
there instead, and `deep_unet` two levels more; all three are of one size. All have the same minutes.

Scores mean IoU, without the background, on 500 scenes; writes `metrics.json`, `scenes.png` (image, truth, prediction)
and `model.pt`. The same command goes on where a run was stopped, from at most a minute before.

Result, mean IoU of three seeds, one thread of a Zen 3, torch 2.14.1, 2026-11-30: clothes 55.3 ± 0.9 % after 5 minutes
(--lr 0.02), the U-Net 56.5 ± 2.4 %; objects 21.7 ± 1.5 and 22.0 ± 1.0 %; corners 94.6, 58.1 and 6.8 % after 10 minutes
(--lr 0.01), the U-Net 6.1, 5.8 and 6.9 %, the deep one 26.4, 5.7 and 97.0 % (docs/results.md). Not yet run on a GPU.

It is a comparison on made-up scenes, and an example of your own loop around a backbone, in one file: for images and
masks of your own, `Scenes.batch` is what to replace. The other recipes share the engine in `linvision.train`.
"""

import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import pairwise
from math import isnan
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
from linvision.nearest import nearest
from linvision.train.metrics import machine
from linvision.train.optimizer import FALLBACK, step_in_stacks
from linvision.train.parallel import choose_device

# the set that scenes are made of, and the side of their canvas
KINDS = {'clothes': ('fashion_mnist', 64), 'objects': ('cifar10', 64), 'corners': ('fashion_mnist', 128)}
VISIBLE = 25  # of 255: darker pixels of an item of clothing are not its own
MARKS = (1, 8)  # trouser and bag: what corners decide by
GREY = 0.5  # behind objects
WIDTHS = {'linformer': (16, 32, 96), 'unet': (16, 32, 136), 'deep_unet': (16, 24, 40, 48, 64)}
WARMUP = 0.05
GREYS, COLOURS = {'cmap': 'gray', 'vmin': 0, 'vmax': 1}, {'cmap': 'tab20', 'vmin': 0, 'vmax': 19}
Draw = Callable[[int, int], int]  # a whole number from the first on, below the second
# what torch and json raise for a file that is cut, or that no run wrote
DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError)


@dataclass
class Settings:
    """A run."""

    network: Literal['linformer', 'unet', 'deep_unet'] = 'linformer'
    """What stands below half resolution: convolutions with the backbone, alone, or at three levels."""
    scenes: Literal['clothes', 'objects', 'corners'] = 'clothes'
    """What is to be seen."""
    backbone: str = 'linformer_vit_pico_patch2_64.tiny_imagenet'
    """Name of the backbone, a timm name, `local-dir:…` or `hf-hub:…`; patches of 1, 2 or 4 pixels."""
    pretrained: bool = True
    """Start from the backbone's weights."""
    minutes: float = 10.0
    """Minutes of training; with one CPU thread, minutes of CPU time, which other work does not shorten."""
    opt: str = 'muon'
    """Optimizer, by timm's name."""
    lr: float = 0.01
    """Highest learning rate."""
    precision: Literal['fp32', 'bf16'] = 'fp32'
    """bf16: matrix products and convolutions in bfloat16 (autocast)."""
    batch_size: int = 8
    """Scenes in a step."""
    canvas: int = 0
    """Side of a scene in pixels, a multiple of 16 from 48 (0: 64, and of corners 128)."""
    test_scenes: int = 500
    """Scenes that are scored."""
    validation: bool = False
    """Score scenes of 5 % of the training images, which are kept apart, to choose settings on."""
    data_dir: Path = Path('data')
    """Folder that holds the images; what is missing is fetched there."""
    output_dir: Path = Path('outputs/segment_pixels')
    """Folder for the results."""
    device: str = 'auto'
    """Torch device."""
    threads: int = 0
    """CPU threads (0: torch's choice)."""
    seed: int = 0
    """Seed of weights and training scenes."""


# -------------------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scenes:
    """Scenes made of a set's images.

    Attributes:
        items: The set.
        kind: What is to be seen, as in `Settings`.
        canvas: Side of a scene in pixels.
    """

    items: Images
    kind: str
    canvas: int

    @property
    def classes(self) -> tuple[str, ...]:
        """What pixels are told apart by, after the background."""
        names = self.items.classes
        return tuple(f'{names[a]}, {names[b]}' for a in MARKS for b in MARKS) if self.kind == 'corners' else names

    def scene(self, index: int, seed: int) -> tuple[Tensor, Tensor]:
        """Scene `index` of a seed: pixels (C, canvas, canvas), 0..1, and the class of each, 0 for the background."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        pixels = torch.full((self.items.in_chans, self.canvas, self.canvas), GREY if self.kind == 'objects' else 0.0)
        classes = torch.zeros(self.canvas, self.canvas, dtype=torch.int64)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        for i, side, top, left, label in (self.pair if self.kind == 'corners' else self.crowd)(draw):
            item = F.interpolate(self.items.images[i][None].float(), size=(side, side), mode='area')[0]
            own = disc(side) if self.kind == 'objects' else item[0] > VISIBLE
            place = (slice(top, top + side), slice(left, left + side))
            pixels[:, *place] = torch.where(own, item / 255, pixels[:, *place])
            classes[place] = torch.where(own, label, classes[place])
        return pixels, classes

    def crowd(self, draw: Draw) -> Iterator[tuple[int, ...]]:
        """Image, side, top, left and class of many things, one over the other."""
        whole, area = self.items.images.shape[-1], max(1, self.canvas**2 // 64**2)
        for _ in range(draw(2 * area, 5 * area + 1)):
            i, side = draw(0, len(self.items)), draw(whole // 2, whole + 1)
            top, left = (draw(0, self.canvas - side + 1) for _ in range(2))
            yield i, side, top, left, int(self.items.labels[i]) + 1

    def pair(self, draw: Draw) -> Iterator[tuple[int, ...]]:
        """The same of two marks in opposite corners, and of what they decide on."""
        labels, whole, third = self.items.labels, self.items.images.shape[-1], self.canvas // 3
        size, marks = min(whole, third - 4), (draw(0, 2), draw(0, 2))

        def one_of(wanted: Tensor) -> int:
            places = wanted.nonzero()
            return int(places[draw(0, len(places))])

        for mark, corner in zip(marks, (0, self.canvas - size - 4), strict=True):
            yield one_of(labels == MARKS[mark]), size, corner + draw(0, 5), corner + draw(0, 5), 0
        side = draw(size, third + 1)
        top, left = (draw(third, 2 * third - side + 1) for _ in range(2))
        yield one_of((labels != MARKS[0]) & (labels != MARKS[1])), side, top, left, 1 + 2 * marks[0] + marks[1]

    def batch(self, first: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Scenes side by side, (B, C, canvas, canvas) and (B, canvas, canvas)."""
        pixels, classes = zip(*(self.scene(first + i, seed) for i in range(count)), strict=True)
        return torch.stack(pixels), torch.stack(classes)


@cache
def disc(side: int) -> Tensor:
    """The pixels of a square that its circle covers."""
    place = (torch.arange(side) + 0.5) / side * 2 - 1
    return place[:, None] ** 2 + place**2 <= 1


# ------------------------------------------------------------------------------------------------------------ networks


class Tokens(nn.Module):
    """A map of what a backbone's second block says, at a quarter of the image's resolution: tokens of 4×4 pixels.

    A backbone with smaller patches sees the image smaller: one with patches of 2×2 pixels at half its size.

    Args:
        backbone: Name of the backbone.
        pretrained: Start from its weights.
        canvas: Side of the images.
        in_chans: Channels of the images.
        width: Channels of the map.
    """

    def __init__(self, backbone: str, pretrained: bool, canvas: int, in_chans: int, width: int) -> None:
        super().__init__()
        patch = timm.create_model(backbone).patch_embed.patch_size[0]
        if patch not in (1, 2, 4):
            end(f'The backbone must have patches of 1, 2 or 4 pixels, got {patch} of {backbone}.')
        self.shrink = nn.AvgPool2d(4 // patch)
        size = {'img_size': canvas * patch // 4, 'in_chans': in_chans}
        options = {'pretrained': pretrained, 'features_only': True, 'out_indices': (1,)}
        self.features = timm.create_model(backbone, **options, **size)
        (channels,) = self.features.feature_info.channels()
        self.mix = nn.Sequential(LayerNorm2d(channels), nn.Conv2d(channels, width, 1))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, width, h / 4, w / 4)."""
        return self.mix(self.features(self.shrink(image))[0])


class UNet(nn.Module):
    """Down to the lowest level and up again, two 3×3 convolutions at each.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes.
        widths: Channels of each level, from full resolution down.
        tokens: What is added to the lowest level: image -> (B, widths[-1], h, w of that level).
    """

    def __init__(
        self, in_chans: int, num_classes: int, widths: tuple[int, ...], tokens: nn.Module | None = None
    ) -> None:
        super().__init__()

        def level(before: int, after: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for channels in (before, after):
                layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            return nn.Sequential(*layers)

        pairs = list(pairwise(widths))
        self.tokens = tokens
        self.down = nn.ModuleList([level(in_chans, widths[0]), *(level(*pair) for pair in pairs)])
        self.up = nn.ModuleList([level(fine + coarse, fine) for fine, coarse in reversed(pairs)])
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, h, w) -> logits (B, num_classes, h, w)."""
        x, maps = image, []
        for i, level in enumerate(self.down):
            x = level(F.max_pool2d(x, 2) if i else x)
            maps.append(x)
        x = maps.pop()
        if self.tokens is not None:
            x = x + self.tokens(image)
        for level, fine in zip(self.up, reversed(maps), strict=True):
            x = level(torch.cat([F.interpolate(x, scale_factor=2.0, mode='nearest'), fine], dim=1))
        return self.head(x)


# ------------------------------------------------------------------------------------------------- training and scoring


def network(settings: Settings, in_chans: int, num_classes: int) -> nn.Module:
    """What is trained, from normalised pixels to logits."""
    if settings.network != 'linformer':
        return UNet(in_chans, num_classes, WIDTHS[settings.network])
    *_, width = widths = WIDTHS['linformer']
    tokens = Tokens(settings.backbone, settings.pretrained, settings.canvas, in_chans, width)
    return UNet(in_chans, num_classes, widths, tokens)


def create_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """timm's; Muon takes the matrices within the network, AdamW what is no such matrix, as in `linvision.train`."""
    others = partial(param_groups_weight_decay, weight_decay=0.0, fallback_list=[f'*.{name}' for name in FALLBACK])
    optimizer = create_optimizer_v2(model, settings.opt, lr=settings.lr, param_group_fn=others)
    if settings.opt == 'muon':
        step_in_stacks(optimizer, settings.precision == 'fp32' and next(model.parameters()).device.type == 'cpu')
    return optimizer


def train(model: nn.Module, made: Scenes, settings: Settings, device: torch.device) -> dict[str, Any]:
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
    clock = time.process_time if device.type == 'cpu' and settings.threads == 1 else time.perf_counter
    saved_at, began = at['seconds'], clock() - at['seconds']
    while (progress := at['seconds'] / (60 * settings.minutes)) < 1:
        for group in optimizer.param_groups:  # up in a line, then down in a line
            group['lr'] = settings.lr * min(progress / WARMUP, (1 - progress) / (1 - WARMUP))
        first = at['step'] * settings.batch_size
        pixels, classes = made.batch(first, settings.batch_size, settings.seed + 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == 'bf16'):
            logits = model(pixels.to(device))
        loss = F.cross_entropy(logits.float(), classes.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        at = {'step': at['step'] + 1, 'seconds': clock() - began}
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
    """IoU of each class from how often each truth (row) was said to be each class (column); NaN where it is neither."""
    hits = confusion.diagonal()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


def score(model: nn.Module, made: Scenes, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Mean IoU of the classes but the background, and accuracy of all pixels, on scenes of other images."""
    n = len(made.classes) + 1
    confusion = torch.zeros(n, n, dtype=torch.float64)
    for first in range(0, settings.test_scenes, 20):
        count = min(20, settings.test_scenes - first)
        pixels, truth = made.batch(first, count, 0)
        found = predict(model, pixels, device)
        confusion += torch.bincount((truth * n + found).flatten(), minlength=n * n).view(n, n)
    iou = intersection_over_union(confusion)
    names = {name: value for name, value in zip(made.classes, iou[1:].tolist(), strict=True) if not isnan(value)}
    accuracy = (confusion.diagonal().sum() / confusion.sum()).item()
    return {'mean_iou': iou[1:].nanmean().item(), 'pixel_accuracy': accuracy, 'iou': names}


def draw(model: nn.Module, made: Scenes, device: torch.device, path: Path, count: int = 6) -> None:
    """Scenes as they are, their classes, and the classes that the model says."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    pixels, truth = made.batch(0, count, 0)
    rows = {'image': pixels.movedim(1, -1).squeeze(-1), 'truth': truth, 'said': predict(model, pixels, device)}
    figure = Figure(figsize=(1.9 * count, 6.6), layout='constrained')
    axes = figure.subplots(3, count)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        colours = GREYS if name == 'image' else COLOURS
        for axis, values in zip(line, pictures, strict=True):
            image = axis.imshow(values.numpy(), interpolation='nearest', **colours)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name)
    patches = [Patch(color=image.cmap(image.norm(i + 1)), label=name) for i, name in enumerate(made.classes)]
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
    settings = replace(settings, canvas=settings.canvas or KINDS[settings.scenes][1])
    if settings.canvas < 48 or settings.canvas % 16:
        end(f'canvas must be a multiple of 16, and 48 pixels at least, got {settings.canvas}.')
    if not settings.minutes > 0:
        end(f'minutes must be above 0, got {settings.minutes}.')
    if settings.backbone.partition('.')[0] not in (names := timm.list_models('*linformer_vit*')):
        end(nearest('backbone', settings.backbone, names))
    folder, device = settings.output_dir, choose_device(settings.device)
    own = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / 'settings.json').is_file() and read(folder / 'settings.json') != own:
        end(f'{folder} holds a run with other settings: choose another --output-dir.')
    if (folder / 'metrics.json').is_file():
        print(f'{folder} holds this run, finished')
        return read(folder / 'metrics.json')
    (folder / 'settings.json').write_text(json.dumps(own, indent=2) + '\n')
    dataset, _ = KINDS[settings.scenes]
    items, test_items = (create_dataset(dataset, settings.data_dir, split) for split in ('train', 'test'))
    if settings.validation:
        items, test_items = split_validation(items, 0.05, settings.seed)
    torch.manual_seed(settings.seed)
    made, tested = (Scenes(each, settings.scenes, settings.canvas) for each in (items, test_items))
    normalise = Normalize(*items.statistics())
    model = nn.Sequential(normalise, network(settings, items.in_chans, len(made.classes) + 1)).to(device)
    trained = train(model, made, settings, device)
    torch.save(model.state_dict(), folder / 'model.pt')
    metrics = {**score(model, tested, settings, device), **trained, 'settings': own, **machine(device)}
    metrics['num_parameters'] = sum(p.numel() for p in model.parameters())
    (folder / 'metrics.json').write_text(json.dumps(metrics, indent=2) + '\n')
    draw(model, tested, device, folder / 'scenes.png')  # last: it may fail
    print(f'mean IoU {100 * metrics["mean_iou"]:.1f} %, {metrics["num_parameters"]:,} parameters, {folder}')
    return metrics


def command() -> None:
    """Train by the command line's flags."""
    with guarded():
        main(tyro.cli(Settings, description=__doc__))


if __name__ == '__main__':
    command()
