"""Training: a recipe in, a model and its score out."""

from linvision.train.loop import train
from linvision.train.main import main
from linvision.train.recipe import Recipe
from linvision.train.settings import Augment, Data, Optim, Run

__all__ = ['Augment', 'Data', 'Optim', 'Recipe', 'Run', 'main', 'train']
