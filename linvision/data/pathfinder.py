"""Pathfinder, made on the spot: do the two marked ends belong to one dashed path? (arXiv 1805.08315)

The long-range benchmark of Long Range Arena (arXiv 2011.04006), 32 to 256 pixels square: 1,024 to 65,536 tokens.
Notable here:

- Image i of a split under a seed is always the same image: no file, no order, no worker has a part in it.
- The label is drawn, not found out: geometry is made and rejected without it, and it only says which ends get a marker
  (both of one path, or one of each). So without markers there is nothing to learn.
- Every pair of images 2j, 2j + 1 has one of each label, in random order: the labels are balanced.
- Images are read whole in evaluation too, whatever share of an image a model's weights were made for: a marker may lie
  at the edge.
- Sizes, distances, margins and counts are those that LRA published (`SIZES`). Turns are von Mises with concentration
  2 × continuity, and the dashes in images of 64 and 256 pixels are about as long, for their size, as in those of 32 and
  128: our reading, where none is published. Scores are not comparable to the digit with those on LRA's released files.

A path grows dash by dash; no dash comes within `margin` of another's, but for its neighbours.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from linvision.data.image_cache import ImageCache
from linvision.data.image_set import statistics
from linvision.data.order import seed_of

LENGTHS = (6, 9, 14)  # dashes of a path: how hard it is
SPLITS = {'train': 160_000, 'test': 20_000}  # LRA's numbers of images
CLASSES = ('two paths', 'one path')
ANTIALIAS = 2  # pictures are drawn so many times as large, and averaged
TURNS = 12  # directions that are tried for a dash before the path is given up
STARTS = 20  # places that are tried for a distractor before it is left out
LOOKS = 256  # images that mean and standard deviation are taken of
VERSION = 2  # of the images, in the name of their cache: raise it with every change of what is drawn (2: of the seeds)


class Size(NamedTuple):
    """The published figures for one image size; lengths in pixels."""

    seed_distance: float  # between the first ends of the two paths
    marker_radius: float
    dash: float
    thickness: float
    margins: tuple[int, ...]  # one is drawn for each image
    continuity: float
    distractors: int  # dashes of all distractors, about
    contrast: float


SIZES = {
    32: Size(7, 1.5, 2, 0.5, (1,), 1.0, 20, 1.5),
    64: Size(12, 2.5, 3, 1.0, (1,), 1.8, 22, 0.9),
    128: Size(20, 3.0, 5, 1.5, (2, 3), 1.8, 35, 0.9),
    256: Size(27, 5.0, 10, 2.0, (3,), 1.8, 30, 0.9),
}

Point = tuple[float, float]
Dash = tuple[Point, Point]


@dataclass
class Scene:
    """The geometry of an image, (x, y) in pixels, made without the label.

    Attributes:
        paths: The two long paths, dash by dash.
        distractors: Short ones.
        rejected: How often the two paths were begun anew.
    """

    paths: tuple[list[Dash], list[Dash]]
    distractors: list[list[Dash]]
    rejected: int

    def marked(self, label: int) -> tuple[Point, Point]:
        """The ends with a marker: both of the first path, or the first path's first and the second's last."""
        return self.paths[0][0][0], self.paths[0 if label else 1][-1][1]


class Canvas:
    """Pixels near which no further dash may come.

    Args:
        img_size: Side of the image.
        size: Its figures.
        margin: Pixels between dashes.
    """

    def __init__(self, img_size: int, size: Size, margin: int) -> None:
        self.img_size, self.size, self.margin = img_size, size, margin
        self.taken: set[int] = set()  # y * stride + x
        self.stride = img_size + 2 * margin  # what lies over the edge is no other row's
        reach = range(-margin, margin + 1)
        self.near = [dy * self.stride + dx for dx in reach for dy in reach if math.hypot(dx, dy) <= margin]
        n = math.ceil(2 * size.dash)
        self.shares = [i / n for i in range(n + 1)]

    def cells(self, dash: Dash) -> set[int]:
        """Pixels under a dash."""
        (x0, y0), (x1, y1) = dash
        width, height, stride = x1 - x0, y1 - y0, self.stride
        return {int(y0 + height * t) * stride + int(x0 + width * t) for t in self.shares}

    def holds(self, point: Point, border: float) -> bool:
        """Whether a point lies at least `border` pixels inside."""
        high = self.img_size - border
        return border <= point[0] < high and border <= point[1] < high

    def fits(self, dash: Dash, border: float) -> bool:
        """Whether a dash lies inside, and far enough from all others."""
        inside = self.holds(dash[0], border) and self.holds(dash[1], border)
        return inside and self.taken.isdisjoint(self.cells(dash))

    def take(self, dashes: Sequence[Dash]) -> None:
        """Keep others away from these."""
        for dash in dashes:
            for cell in self.cells(dash):
                self.taken.update([cell + step for step in self.near])

    def grow(self, rng: random.Random, start: Point, dashes: int, border: float) -> list[Dash]:
        """A path from a point on; empty where it does not fit. What it takes is kept only if it does."""
        path: list[Dash] = []
        before = set(self.taken)
        angle, end, gap = rng.uniform(-math.pi, math.pi), start, 0
        while len(path) < dashes:
            for _ in range(TURNS):
                turn = rng.vonmisesvariate(0.0, 2 * self.size.continuity)
                turn = math.remainder(turn, 2 * math.pi) if path else 0.0
                if abs(turn) > math.pi / 2:  # it would run back into its neighbour
                    continue
                x, y = math.cos(angle + turn), math.sin(angle + turn)
                first = (end[0] + gap * x, end[1] + gap * y)
                dash = (first, (first[0] + self.size.dash * x, first[1] + self.size.dash * y))
                if self.fits(dash, border):
                    break
            else:
                self.taken = before
                return []
            self.take(path[-1:])  # the neighbour of a dash may be near it, those before may not
            path.append(dash)
            angle, end, gap = angle + turn, dash[1], self.margin
        self.take(path[-1:])
        return path


def make_scene(img_size: int, contour_length: int, rng: random.Random) -> Scene:
    """Two paths whose first ends lie `seed_distance` apart, and distractors a third as long."""
    size = SIZES[img_size]
    margin = rng.choice(size.margins)
    border = 1 + size.marker_radius / 2
    rejected = 0
    while True:
        canvas = Canvas(img_size, size, margin)
        first = (rng.uniform(border, img_size - border), rng.uniform(border, img_size - border))
        angle = rng.uniform(-math.pi, math.pi)
        second = (first[0] + size.seed_distance * math.cos(angle), first[1] + size.seed_distance * math.sin(angle))
        one = canvas.grow(rng, first, contour_length, border) if canvas.holds(second, border) else []
        other = canvas.grow(rng, second, contour_length, border) if one else []
        paths = [one, other]
        if other and markers_apart(paths, 2 * size.marker_radius + 1):
            break
        rejected += 1
    if rng.random() < 0.5:  # the second had less room
        paths.reverse()
    length, distractors = contour_length // 3, []
    for _ in range(int(size.distractors / (length if img_size == 32 else contour_length / 3))):
        for _ in range(STARTS):
            start = (rng.uniform(1, img_size - 1), rng.uniform(1, img_size - 1))
            if found := canvas.grow(rng, start, length, 1):
                distractors.append(found)
                break
    return Scene((paths[0], paths[1]), distractors, rejected)


def markers_apart(paths: Sequence[list[Dash]], distance: float) -> bool:
    """Whether no two of the four ends' markers touch, whichever of them are drawn."""
    ends = [point for path in paths for point in (path[0][0], path[-1][1])]
    return all(math.dist(a, b) >= distance for i, a in enumerate(ends) for b in ends[:i])


def draw(scene: Scene, label: int, img_size: int, markers: bool = True) -> Image.Image:
    """The image of a scene, 8-bit grey: dashes, and markers in white."""
    size, scale = SIZES[img_size], ANTIALIAS
    picture = Image.new('L', (img_size * scale, img_size * scale))
    pen = ImageDraw.Draw(picture)
    for path in (*scene.paths, *scene.distractors):
        for dash in path:
            (x0, y0), (x1, y1) = dash
            share = 1 - 1 / (scale * size.dash)  # a line takes in its last pixel, which is the gap's
            last = (x0 + share * (x1 - x0), y0 + share * (y1 - y0))
            pen.line([v * scale for v in (x0, y0, *last)], fill=255, width=round(size.thickness * scale))
    lines = picture.reduce(scale).point([min(255, round(size.contrast * v)) for v in range(256)])
    if markers:
        discs = Image.new('L', picture.size)
        pen, r = ImageDraw.Draw(discs), size.marker_radius
        for x, y in scene.marked(label):
            pen.ellipse([(x - r) * scale, (y - r) * scale, (x + r) * scale, (y + r) * scale], fill=255)
        lines.paste(255, mask=discs.reduce(scale))
    return lines


@dataclass(frozen=True)
class Pathfinder:
    """Pathfinder images by index, made when they are asked for.

    Attributes:
        index: Which images, by their numbers in the split.
        split: 'train' or 'test'.
        img_size: Side of the images.
        contour_length: Dashes of a path.
        seed: Of the whole set.
        markers: Whether markers are drawn; without them labels cannot be told.
        cache: Where images that were made are kept, or None.
        uncropped: Whether images are read at their own size and whole, whatever size and crop a model was made for.
    """

    index: Sequence[int] = field(repr=False)
    split: str
    img_size: int
    contour_length: int
    seed: int = 0
    markers: bool = True
    cache: ImageCache | None = None
    classes: tuple[str, ...] = CLASSES
    in_chans: int = 1
    uncropped: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> tuple[Image.Image, int]:
        """An image and its label."""
        number = self.index[position]
        if self.cache is None:
            return self.draw(number), self.label(number)
        pixels = self.cache.get(number, lambda: np.asarray(self.draw(number)))
        return Image.fromarray(pixels), self.label(number)

    def label(self, number: int) -> int:
        """1 where both markers lie on one path; of each two images one has it."""
        first = random.Random(seed_of(self.seed, list(SPLITS).index(self.split), number // 2, 1)).getrandbits(1)
        return first ^ (number & 1)

    def scene(self, number: int) -> Scene:
        """The geometry of an image."""
        rng = random.Random(seed_of(self.seed, list(SPLITS).index(self.split), number, 0))
        return make_scene(self.img_size, self.contour_length, rng)

    def draw(self, number: int) -> Image.Image:
        """Make an image."""
        return draw(self.scene(number), self.label(number), self.img_size, self.markers)

    def subset(self, index: Tensor) -> 'Pathfinder':
        """The images at the given positions."""
        return replace(self, index=[self.index[i] for i in index.tolist()])

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of some images."""
        pixels = [np.asarray(self[i][0]).ravel() for i in range(min(LOOKS, len(self)))]
        return statistics(torch.from_numpy(np.concatenate(pixels)).unsqueeze(0))

    def data_config(self, crop_pct: float, crop_mode: str = 'center') -> dict[str, Any]:
        """How timm reads such an image as evaluation did."""
        return {'crop_pct': 1.0, 'crop_mode': crop_mode, 'interpolation': 'bicubic'}


def pathfinder(
    root: Path,
    split: str,
    download: bool,
    img_size: int = 32,
    contour_length: int = 14,
    num_images: int = 0,
    seed: int = 0,
    markers: bool = True,
    cache: bool = False,
) -> Pathfinder:
    """The Pathfinder set.

    Args:
        root: Folder of the cache.
        split: 'train' or 'test'.
        download: Whether the cache may be written; nothing is fetched.
        img_size: 32, 64, 128 or 256.
        contour_length: Dashes of a path: 6, 9 or 14, the hardest.
        num_images: Images of the training set, and eight times those of the test set (0: 160,000 and 20,000).
        seed: Of the whole set.
        markers: Whether markers are drawn.
        cache: Keep images below `root/pathfinder` once they are made: 0.2, 0.7, 3 and 12 GB when all are there.

    Raises:
        ValueError: A size, length or number that there is not.
    """
    if img_size not in SIZES:
        raise ValueError(f'Pathfinder has the sizes {", ".join(map(str, SIZES))}, got img_size={img_size}.')
    if contour_length not in LENGTHS:
        raise ValueError(f'Pathfinder has paths of 6, 9 and 14 dashes, got contour_length={contour_length}.')
    if num_images < 0 or num_images % 16:
        raise ValueError(
            f'num_images must be a multiple of 16, so that labels balance in both splits, got {num_images}. The '
            f'nearest is {max(16, round(num_images / 16) * 16)}.'
        )
    count = SPLITS[split] if not num_images else num_images if split == 'train' else num_images // 8
    name = f'v{VERSION}_{split}_{img_size}_{contour_length}_{seed}{"" if markers else "_plain"}'
    room = max(count, SPLITS[split])  # image i is the same, whatever the number of images
    kept = ImageCache(root / 'pathfinder' / name, room, (img_size, img_size)) if cache and download else None
    return Pathfinder(range(count), split, img_size, contour_length, seed, markers, kept)
