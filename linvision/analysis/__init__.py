"""What a trained model attends to, and how low-rank its attention is."""

from linvision.analysis.attention_map import attention_maps, projection_matrices
from linvision.analysis.spectrum import Spectrum, attention_spectrum

__all__ = ['Spectrum', 'attention_maps', 'attention_spectrum', 'projection_matrices']
