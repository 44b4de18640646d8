"""The numbers of a run: those of a step, and `metrics.json` with what a figure needs beside it."""

import json
import os
import platform
from typing import TYPE_CHECKING, Any

import timm
import torch
import torchvision
from safetensors import SafetensorError
from torch import nn

from linvision.train.export import export_model
from linvision.train.memory import peak_memory_gib
from linvision.train.setup import count_tokens
from linvision.version import __version__

if TYPE_CHECKING:
    from linvision.train.loop import Run


def write_results(run: 'Run', model: nn.Module, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Export the model, then write `metrics.json`, which marks the run as finished.

    Args:
        run: The run.
        model: The model that was scored.
        scores: Scores by split.

    Returns:
        The contents of `metrics.json`.
    """
    at, data, images_seen = run.at, run.data, run.at.step * run.recipe.batch_size
    seconds = max(at.minutes * 60, 1e-9)
    metrics = {
        **scores.get('test', {}),
        **{f'val_{k}': v for k, v in scores.get('val', {}).items()},
        'epochs': images_seen / len(data.train_set),
        'steps': at.step,
        'images_seen': images_seen,
        'train_minutes': at.minutes,
        'images_per_s': images_seen / seconds,
        'tokens_per_s': at.tokens / seconds,
        'tokens': count_tokens(model),
        'peak_memory_gib': peak_memory_gib(run.processes.device),
        'num_parameters': sum(p.numel() for p in model.parameters()),
        'classes': list(data.train_set.classes),
        'bad_training_images': at.bad_images,
        'weights': 'last' if run.learner.ema is None else 'ema',
        'schedule': 'minutes' if run.recipe.max_minutes else 'epochs',
        'precision': run.learner.precision,
        'probe_seconds': run.probe,
        'recipe': run.recipe.to_dict(),
        'images': data.fingerprint,
        'seed': run.recipe.seed,
        **machine(run.processes.device),
        'processes': run.processes.count,
    }
    if at.best_step:
        metrics |= {f'best_val_{run.learner.objective.best}': at.best_score, 'best_step': at.best_step}
        metrics['val_curve'] = at.curve
    if run.processes.main:
        try:
            export_model(
                run.learner.objective.exported(model), run.folder / 'model', data.train_set, data.data_config()
            )
            part = run.folder / 'metrics.json.part'
            part.write_text(json.dumps(metrics, indent=2) + '\n')
            os.replace(part, run.folder / 'metrics.json')
        except (OSError, SafetensorError) as error:
            raise OSError(
                f'The model cannot be written to {run.folder} ({error}). Its checkpoint is there: make room, and the '
                'same command scores and writes it again.'
            ) from error
    return metrics


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
