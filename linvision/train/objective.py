"""What a run learns, and how that is scored: classes, or hidden pixels (`masked_pixels.py`)."""

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.task import ClassificationTask, LogitDistillationTask
from timm.task.task import TrainingTask
from timm.utils import accuracy
from torch import Tensor

from linvision.data import Batches
from linvision.train import pictures
from linvision.train.evaluate import evaluate
from linvision.train.masked_pixels import MaskedPixelsTask, evaluate_masked
from linvision.train.pretrained import load_teacher
from linvision.train.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Classes:
    """Classes, by cross-entropy with the labels, mixed ones, or a teacher beside them.

    Args:
        recipe: The recipe.
    """

    best = 'top1'
    next_step = 'linvision predict {folder} IMAGE'
    best_of_any_size = True  # scores at one image size can be compared with those at another

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def task(
        self, model: VisionTransformer, img_size: int, device: torch.device, classes: tuple[str, ...]
    ) -> TrainingTask:
        """timm's task: the loss, and the teacher's where there is one."""
        recipe = self.recipe
        criterion = {'soft_targets': True} if recipe.augment.mixes else {'smoothing': recipe.optim.smoothing}
        if not recipe.optim.teacher:
            return ClassificationTask(model, criterion_kwargs=criterion, device=device, verbose=False)
        return LogitDistillationTask(
            model,
            load_teacher(recipe.optim.teacher, model, img_size, device, classes),
            criterion_kwargs=criterion,
            task_loss_weight=1 - recipe.optim.teacher_weight,
            temperature=recipe.optim.teacher_temperature,
            device=device,
            verbose=False,
        )

    def scalars(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy of a batch by TensorBoard tag, where its labels are not mixed."""
        if labels.ndim != 1:
            return {}
        top1, top5 = accuracy(logits, labels, (1, min(5, logits.shape[1])))
        return {'train/top1': float(top1) / 100, 'train/top5': float(top5) / 100}

    def score(self, model: VisionTransformer, batches: Batches, img_size: int, precision: str) -> dict[str, float]:
        """Scores on a set; all processes call this together."""
        return evaluate(model, batches, img_size, precision)

    def quality(self, scores: dict[str, float]) -> float:
        """What is larger for a better model."""
        return scores['top1']

    def exported(self, model: VisionTransformer) -> VisionTransformer:
        """The model as later users want it."""
        return model

    def pictures(self) -> dict[str, Callable[..., 'Figure | None']]:
        """Pictures of a trained model, by name."""
        return {'misclassified': pictures.misclassified, 'attention': pictures.attention}


class MaskedPixels(Classes):
    """Hidden pixels, by the squared error."""

    best = 'loss'
    next_step = 'linvision train NAME --init {folder}'
    best_of_any_size = False  # smaller images are smoother

    def task(
        self, model: VisionTransformer, img_size: int, device: torch.device, classes: tuple[str, ...]
    ) -> TrainingTask:
        """timm's task with hidden pixels."""
        return MaskedPixelsTask(model, self.recipe.mask_ratio, self.recipe.mask_size, device=device, verbose=False)

    def scalars(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """None but the loss."""
        return {}

    def score(self, model: VisionTransformer, batches: Batches, img_size: int, precision: str) -> dict[str, float]:
        """The loss on a set; all processes call this together."""
        return evaluate_masked(model, batches, img_size, self.recipe.mask_ratio, self.recipe.mask_size, precision)

    def quality(self, scores: dict[str, float]) -> float:
        """What is larger for a better model."""
        return -scores['loss']

    def exported(self, model: VisionTransformer) -> VisionTransformer:
        """The backbone: without a head, its pooling as registered."""
        backbone = copy.deepcopy(model)
        usual_pool: Any = backbone.usual_pool  # `masked_pixels.adapt` sets it, no class declares it
        backbone.reset_classifier(0, usual_pool)
        return backbone

    def pictures(self) -> dict[str, Callable[..., 'Figure | None']]:
        """Images with hidden parts, and what the model makes of them."""
        hide: dict[str, Any] = {'ratio': self.recipe.mask_ratio, 'size': self.recipe.mask_size}
        return {'reconstructions': partial(pictures.reconstructions, **hide)}


OBJECTIVES: dict[str, type[Classes]] = {'classify': Classes, 'masked_pixels': MaskedPixels}
