"""The data of a run: the training set, its validation slice and the test set, cut into this process's batches."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import timm
from timm.data import Mixup
from timm.models import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from linvision.data import Augmentation, Batches, Images, ImageSet, create_batches, create_dataset, split_validation
from linvision.data.folders import ImageFiles
from linvision.data.loader_batches import LoaderBatches
from linvision.data.native_sizes import CROP_MODE, NativeBatches, NativeSizes, OrderBySize
from linvision.train.model import count_tokens, empty_model
from linvision.train.parallel import Processes
from linvision.train.recipe import Recipe


class TrainingData:
    """What a recipe trains and is scored on.

    Args:
        recipe: The recipe.
        processes: The processes of the run.

    Attributes:
        train_set: The training set without its validation slice.
        fingerprint: What tells the training images, its slice with them, from others.
        mean, std: How images are normalised.
        batches: Batches of the training set.
        validation: Batches of the slice, or None.
        test: Batches of the test set, or None.
        cropping: Share of an image file that evaluation sees, and what becomes of files that are not square.
        stages: Image sizes with their shares of the run.
        mixup: timm's Mixup and CutMix.
    """

    def __init__(self, recipe: Recipe, processes: Processes) -> None:
        self.recipe, self.processes = recipe, processes
        all_images = self.open_split('train')
        self.fingerprint = fingerprint(all_images)
        self.train_set, val_set = split_validation(all_images, recipe.data.val_fraction, recipe.run.seed)
        if recipe.data.val_fraction and not len(val_set):
            raise ValueError(
                f'val_fraction {recipe.data.val_fraction:g} of {len(all_images)} training images is none: say '
                f'--val-fraction {1 / len(all_images):.2g} or more, or 0.'
            )
        self.mean, self.std = self.train_set.statistics()
        config = timm.get_pretrained_cfg(recipe.model) or PretrainedCfg()  # timm's defaults, as its factory has them
        # above 1 is the border of a set in memory, that of weights which come with the package
        crop_pct = 1.0 if self.train_set.uncropped else min(config.crop_pct or 1.0, 1.0)
        self.cropping: dict[str, Any] = {'crop_pct': crop_pct, 'crop_mode': recipe.data.crop_mode}
        if recipe.data.native_sizes:
            self.cropping = {'crop_pct': 1.0, 'crop_mode': CROP_MODE}
        self.stages = recipe.data.stages or ((recipe.data.img_size or self.natural_size(config.input_size[-1]), 1.0),)
        self.check_classes()
        if len(self.stages) > 2:
            self.check_stages()
        if len(self.train_set) < recipe.data.batch_size:
            raise ValueError(
                f'batch_size {recipe.data.batch_size} is larger than the training set of {len(self.train_set)} images: '
                f'say --batch-size {len(self.train_set)} or less.'
            )
        self.batches = self.batches_of(self.train_set, recipe.data.batch_size, recipe.augment.changes)
        self.validation = self.batches_of(val_set, recipe.data.eval_batch_size) if len(val_set) else None
        # opened before training, so that what is wrong with it is said before
        self.test = self.batches_of(self.open_split('test'), recipe.data.eval_batch_size) if recipe.run.test else None
        classes = len(self.train_set.classes)
        self.mixup = Mixup(
            recipe.augment.mixup, recipe.augment.cutmix, label_smoothing=recipe.optim.smoothing, num_classes=classes
        )

    def check_stages(self) -> None:
        """Raise ValueError for an image size that the model cannot have; the first and the last are met at once."""
        for img_size, _ in self.stages[1:-1]:
            empty_model(self.recipe, self.shape, self.stages[-1][0], img_size)

    def check_classes(self) -> None:
        """Raise ValueError where there is nothing to tell apart."""
        classes = self.train_set.classes
        if len(classes) < 2 and self.recipe.task == 'classify':
            raise ValueError(
                f'{self.recipe.data.dataset} in {self.recipe.data.data_dir} has one class only, {classes[0]!r}, and '
                'there must be two to tell apart. Is it one folder too high or too low?'
            )

    def open_split(self, split: str) -> Images:
        """A split of the recipe's set: the first process fetches what is missing, then the others read it."""
        wanted = self.recipe.data
        fetch = wanted.download and not self.recipe.run.dry_run  # which writes nothing
        load = partial(create_dataset, wanted.dataset, wanted.data_dir, split, fetch, **wanted.dataset_args)
        loaded: list[Images] = []
        self.processes.first(lambda: loaded.append(load()))
        return loaded[0] if loaded else load()

    def batches_of(self, images: Images, batch_size: int, augmentation: Augmentation | None = None) -> Batches:
        """This process's share of the batches of a set."""
        wanted = self.recipe.data
        reading = {'workers': wanted.workers, 'on_bad_image': wanted.on_bad_image, **self.cropping}
        where = (self.processes.device, augmentation, self.processes.share, self.processes.shares)
        reading |= {'rows': self.rows, 'native': self.native}
        return create_batches(images, batch_size, self.mean, self.std, *where, **reading)

    @cached_property
    def native(self) -> NativeSizes | None:
        """To which size each image is brought, where images keep their shape."""
        if not self.recipe.data.native_sizes:
            return None
        return NativeSizes.of(empty_model(self.recipe, self.shape, self.stages[-1][0]))

    @cached_property
    def rows(self) -> Callable[[int], slice] | None:
        """The rows of pixels that this process has of images of a size; None for all of them."""
        if self.processes.sequence == 1:
            return None
        patch = empty_model(self.recipe, self.shape, self.stages[-1][0]).patch_embed.patch_size[0]
        return partial(self.processes.rows, patch=patch)

    def natural_size(self, model_size: int) -> int:
        """The image size of a recipe without stages: the set's own, for files at most the model's."""
        found = self.train_set.img_size
        native = self.recipe.data.native_sizes
        if native and isinstance(self.train_set, ImageFiles):  # of the images that were looked at none is shrunk
            found = max(math.isqrt(width * height - 1) + 1 for width, height in self.train_set.sizes)
        if self.train_set.uncropped:
            return found
        if not found or found >= model_size:
            return model_size
        patch = empty_model(self.recipe, self.shape, model_size).patch_embed.patch_size[0]
        return max(patch, -(-found // patch) * patch if native else found // patch * patch)

    @property
    def reads_files(self) -> bool:
        """Whether images are read while the model trains, and can be waited for."""
        return isinstance(self.batches, LoaderBatches)

    @property
    def shape(self) -> dict[str, int]:
        """What the images ask of a model."""
        return {'in_chans': self.train_set.in_chans, 'num_classes': len(self.train_set.classes)}

    @property
    def notes(self) -> list[str]:
        """What a user would want to know of the images, in words."""
        notes = []
        if self.recipe.run.eval_every and self.validation is None:
            notes.append('no scores on the way: --eval-every needs a --val-fraction')
        if self.cropping['crop_mode'] == 'center' and isinstance(self.train_set, ImageFiles):
            long = sum(max(size) > 1.1 * min(size) for size in self.train_set.sizes) / len(self.train_set.sizes)
            if long >= 0.1:
                notes.append(
                    f'{100 * long:.0f} % of the images are not square: their middle is used. --crop-mode border or '
                    'squash takes them whole, --native-sizes in their own shape.'
                )
        read, found = self.stages[-1][0], self.train_set.img_size if isinstance(self.train_set, ImageFiles) else 0
        if found >= 2 * read and not self.recipe.data.native_sizes:
            notes.append(
                f'images of {found} pixels on their shorter side (median) are read at {read}×{read}: details are lost. '
                f'--img-size {2 * read} reads more of them, in four times the time.'
            )
        if isinstance(self.batches, NativeBatches):
            sizes = self.batches.sizes
            notes.append(
                f'images keep their shape, at most {sizes.max_seq_len:,} tokens each, sides rounded up to '
                f'{sizes.step * sizes.patch_size[0]} pixels: {self.batches.order.words}'
            )
        return notes

    @property
    def note(self) -> str:
        """What a result on the images must say of them; '' of most."""
        return self.train_set.note if isinstance(self.train_set, ImageSet) else ''

    @property
    def title(self) -> str:
        """Name of the set, with its note."""
        return f'{self.recipe.data.dataset} ({self.note})' if self.note else self.recipe.data.dataset

    def tokens(self, model: VisionTransformer) -> float:
        """Tokens of an image of the training set, on average, at a model's present size."""
        order = self.batches.order
        return float(order.tokens.mean()) if isinstance(order, OrderBySize) else count_tokens(model)

    def largest(self, step: int, img_size: int) -> tuple[int, str]:
        """A step whose images are as large as any: `step`, where all have one size; and that size, in words."""
        order = self.batches.order
        if not isinstance(order, OrderBySize):
            return step, f'{img_size}×{img_size} pixels'
        step, tokens = order.largest(self.recipe.run.seed)
        return step, f'at most {tokens:,} tokens, the largest of an epoch,'

    def stream(self, step: int, img_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches from a step on."""
        return self.batches.stream(self.recipe.run.seed, step, img_size)

    def bad_images(self) -> list[str]:
        """What could not be read in training, in words; all processes call this together."""
        return self.processes.union(self.batches.bad_images)

    def data_config(self) -> dict[str, Any]:
        """How timm reads an image as evaluation did."""
        return {'mean': self.mean, 'std': self.std, **self.train_set.data_config(**self.cropping)}


def fingerprint(images: Images) -> dict[str, Any]:
    """How many images a set has, and a digest of its classes and, for files, of their names."""
    words = [*images.classes, *(images.names if isinstance(images, ImageFiles) else [])]
    if isinstance(images, ImageSet) and images.digest:
        words.append(images.digest)
    return {'num_images': len(images), 'digest': hashlib.sha256(os.fsencode('\n'.join(words))).hexdigest()}
