"""Training: a recipe in, a model and its score out."""

from linvision.train.loop import train
from linvision.train.main import main
from linvision.train.recipe import Recipe

__all__ = ['Recipe', 'main', 'train']
