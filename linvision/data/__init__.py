"""Datasets by name, and the batches that a recipe trains on."""

from linvision.data.augmentation import Augmentation
from linvision.data.batches import Batches, create_batches, in_memory
from linvision.data.datasets import DATASETS, Images, create_dataset, part, split_validation
from linvision.data.image_set import ImageSet

__all__ = [
    'DATASETS',
    'Augmentation',
    'Batches',
    'ImageSet',
    'Images',
    'create_batches',
    'create_dataset',
    'in_memory',
    'part',
    'split_validation',
]
