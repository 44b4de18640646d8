"""What a trained model attends to, and how low-rank its attention is."""

from linvision.analysis.attention_map import (
    attention_maps,
    difference_between_images,
    projection_matrices,
    tokens_of_images,
)
from linvision.analysis.spectrum import Spectrum, attention_spectrum

__all__ = [
    'Spectrum',
    'attention_maps',
    'attention_spectrum',
    'difference_between_images',
    'projection_matrices',
    'tokens_of_images',
]
