"""Datasets by name, and the batches that a recipe trains on."""

from linvision.data.datasets import DATASETS, ImageSet, create_dataset
from linvision.data.device_batches import DeviceBatches

__all__ = ['DATASETS', 'DeviceBatches', 'ImageSet', 'create_dataset']
