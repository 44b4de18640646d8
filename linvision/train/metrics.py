"""The numbers of a run: those of a step, and `metrics.json` with what a figure needs beside it."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from linvision.train.data import TrainingData
from linvision.train.export import export_model
from linvision.train.learner import Learner
from linvision.train.memory import peak_memory_gib
from linvision.train.parallel import Processes
from linvision.train.progress import Progress
from linvision.train.recipe import Recipe
from linvision.version import __version__


def run_metrics(
    recipe: Recipe,
    progress: Progress,
    data: TrainingData,
    learner: Learner,
    processes: Processes,
    model: VisionTransformer,
    scores: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """What stands in `metrics.json`.

    Args:
        recipe: What was trained.
        progress: How far.
        data: On what.
        learner: What learnt.
        processes: Where.
        model: The model that was scored, whole.
        scores: Scores by split.
    """
    images_seen, seconds = progress.step * recipe.data.batch_size, max(progress.minutes * 60, 1e-9)
    metrics = {
        **scores.get('test', {}),
        **{f'val_{k}': v for k, v in scores.get('val', {}).items()},
        'epochs': images_seen / len(data.train_set),
        'steps': progress.step,
        'images_seen': images_seen,
        'train_minutes': progress.minutes,
        'images_per_s': images_seen / seconds,
        'tokens_per_s': progress.tokens / seconds,
        'tokens': round(data.tokens(model)),
        'peak_memory_gib': peak_memory_gib(processes.device),
        'num_parameters': sum(p.numel() for p in model.parameters()),
        'classes': list(data.train_set.classes),
        'bad_training_images': progress.bad_images,
        'weights': 'last' if learner.ema is None else 'ema',
        'schedule': 'minutes' if recipe.run.max_minutes else 'epochs',
        'precision': learner.precision,
        'recipe': recipe.to_dict(),
        'images': data.fingerprint,
        **({'data_note': data.note} if data.note else {}),
        'seed': recipe.run.seed,
        **machine(processes.device),
        'processes': processes.count,
    }
    if progress.best_step:
        metrics |= {f'best_val_{learner.objective.best}': progress.best_score, 'best_step': progress.best_step}
        metrics['val_curve'] = progress.curve
    return metrics


def write_model(folder: Path, model: nn.Module, data: TrainingData) -> None:
    """Export a model to `model/`: before it is scored, since a test image may be missing, damaged or too large.

    Raises:
        OSError: The folder cannot be written.
    """
    with writing(f'The model cannot be written to {folder}/model'):
        export_model(model, folder / 'model', data.train_set, data.data_config())


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write `metrics.json`, which marks the run as finished.

    Raises:
        OSError: The folder cannot be written.
    """
    with writing(f'The score cannot be written to {folder}/metrics.json'):
        part = folder / 'metrics.json.part'
        part.write_text(json.dumps(metrics, indent=2) + '\n')
        os.replace(part, folder / 'metrics.json')


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Say what could not be written, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f'{what} ({error}). The checkpoint is there: make room, or move away what is in the way, and the same '
            'command writes the model, scores it and writes the score.'
        ) from error


def machine(device: torch.device) -> dict[str, Any]:
    """The device, the threads and the versions."""
    cuda = device.type == 'cuda'
    return {
        'device': torch.cuda.get_device_name(device) if cuda else f'{device.type} {platform.machine()}',
        'threads': torch.get_num_threads(),
        'versions': {
            'python': platform.python_version(),
            'torch': torch.__version__,
            'torchvision': torchvision.__version__,
            'timm': timm.__version__,
            'linvision': __version__,
        },
    }
