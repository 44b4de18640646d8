"""The training loop, read from top to bottom: a recipe in; a trained model, its score and its curves out.

Notable here:

- Steps or minutes: one number, `progress` from 0 to 1, drives the learning rate, the stages and the end.
- Coarse to fine: `stages` changes the image size through the model's `set_input_size`.
- Order, augmentation and dropout are functions of (seed, epoch, index) and (seed, step): a resumed run repeats nothing.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from timm.data import Mixup
from timm.task import ClassificationTask
from torch import Tensor, nn

from linvision.data import DeviceBatches, create_dataset
from linvision.train.board import Board, peak_memory_gib
from linvision.train.checkpoint import check_same_run, load_checkpoint, save_checkpoint
from linvision.train.evaluate import evaluate
from linvision.train.export import export_model
from linvision.train.optimizer import CLOCK_UPDATES, carry_state, create_optimizer, create_schedule
from linvision.train.precision import autocast, choose_precision
from linvision.train.recipe import Recipe
from linvision.train.setup import choose_device, count_tokens, create_model, open_folder, set_size, split_validation
from linvision.version import __version__


def train(recipe: Recipe, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Train, score and export a model.

    Args:
        recipe: What to train. `recipe.output_dir` receives `metrics.json`, `model/`, `checkpoints/` and `tensorboard/`.
            An unfinished run in it is resumed; a finished one is reported as it is.
        interrupted: Asked after every step and before the scores; true ends the run with a checkpoint.

    Returns:
        The contents of `metrics.json`; empty where the run was stopped before its end.

    Raises:
        ValueError: A recipe that cannot be trained, or a folder with a run of another recipe.
        FileNotFoundError: The data is missing.
        OSError: The output folder cannot be written.
        FloatingPointError: The loss is not finite; the last checkpoint is kept.
    """
    # ------------------------------------------------------------------------------------------------ folder, machine
    recipe.validate()
    folder = Path(recipe.output_dir)
    finished = open_folder(folder, recipe)
    if finished:
        found = [f'{k} {100 * finished[k]:.2f} %' for k in ('top1', 'val_top1') if k in finished]
        print(f'{folder} holds this run, finished: {", ".join(found) or "not scored"}.')
        return finished
    resumed = load_checkpoint(folder / 'checkpoints')
    if resumed:
        check_same_run(folder, recipe.to_dict(), resumed['recipe'])
    device = choose_device(recipe.device)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)

    # ----------------------------------------------------------------------------------------------------------- data
    train_set = create_dataset(recipe.dataset, recipe.data_dir, 'train', recipe.download)
    train_set, val_set = split_validation(train_set, recipe.val_fraction, recipe.seed)
    mean, std = train_set.statistics()
    train_batches = DeviceBatches(train_set, recipe.batch_size, mean, std, device)
    val_batches = DeviceBatches(val_set, recipe.eval_batch_size, mean, std, device) if len(val_set) else None
    if not len(train_batches):
        raise ValueError(f'batch_size {recipe.batch_size} is larger than the training set of {len(train_set)} images.')
    mixup = None
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=len(train_set.classes))

    # ---------------------------------------------------------------------------------------------- model, optimizer
    total = CLOCK_UPDATES if recipe.max_minutes else max(1, round(recipe.epochs * len(train_batches)))
    stages = recipe.stages or ((train_set.img_size, 1.0),)
    model = create_model(recipe, train_set, stages[-1][0]).to(device)
    step, minutes, stage, tokens = (
        (resumed[k] for k in ('step', 'minutes', 'stage', 'tokens')) if resumed else (0, 0.0, 0, 0)
    )
    set_size(model, stages[stage][0])
    task = ClassificationTask(
        model,
        criterion_kwargs={'soft_targets': True} if mixup else {'smoothing': recipe.smoothing},
        device=device,
        verbose=False,
    )
    optimizer = create_optimizer(recipe, model)
    schedule = create_schedule(recipe, optimizer, total)
    images, _ = next(train_batches.epoch(recipe.seed, 0, stages[stage][0]))
    if resumed:
        precision, probe = resumed['precision'], resumed['probe']
    else:
        precision, probe = choose_precision(recipe.precision, model, images)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')
    if recipe.ema_decay:
        task.setup_ema(decay=recipe.ema_decay, use_warmup=True)
    if resumed:
        restore(resumed, task, optimizer, scaler)

    board = Board(folder, recipe, step)
    board.say(
        f'{recipe.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {recipe.dataset}: '
        f'{len(train_set):,} training images, {device}, {precision}, {torch.get_num_threads()} threads'
        + (f'; resumed at step {step}' if resumed else '')
    )

    def state() -> dict[str, Any]:
        return {
            'recipe': recipe.to_dict(),
            'step': step,
            'minutes': minutes,
            'stage': stage,
            'tokens': tokens,
            'precision': precision,
            'probe': probe,
            'model': model.state_dict(),
            'ema': task.get_trainable_module(ema=True).module.state_dict() if task.has_ema() else {},
            'optimizer': optimizer.state_dict(),
            'scaler': scaler.state_dict(),
        }

    # ----------------------------------------------------------------------------------------------------------- loop
    progress = minutes / recipe.max_minutes if recipe.max_minutes else step / total
    last_log, scores = (step, minutes), {}
    if recipe.max_steps and step >= recipe.max_steps and progress < 1:
        board.say(f'{step} steps are taken already, and --max-steps is {recipe.max_steps}')
        board.close()
        return {}
    while progress < 1:
        # the stage that this share of the run belongs to
        if stage != stage_at(stages, progress):
            stage = stage_at(stages, progress)
            optimizer = change_size(recipe, task, optimizer, stages[stage][0])
            schedule = create_schedule(recipe, optimizer, total)
        img_size = stages[stage][0]
        board.say(f'stage {stage + 1} of {len(stages)}: {img_size}×{img_size} images from step {step}')

        model.train()
        tick = time.perf_counter()
        for images, labels in train_batches.stream(recipe.seed, step, img_size, recipe.hflip, recipe.shift):
            torch.manual_seed(hash((recipe.seed, step)) % 2**63)
            if mixup:
                np.random.seed(hash((recipe.seed, step)) % 2**32)
                images, labels = mixup(images, labels)
            if step == 0:
                board.batch(images, step)

            # forward, backward, update
            schedule.step(int(progress * total))
            loss, grad_norm = update(task, optimizer, scaler, images, labels, precision, recipe.clip_grad)
            saves = (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.max_steps
            look = device.type == 'cpu' or (step + 1) % recipe.log_every == 0 or saves  # never save what is not finite
            if look and not (torch.isfinite(loss) and (torch.isfinite(grad_norm) or scaler.is_enabled())):
                raise FloatingPointError(
                    f'The loss is {loss.item()} at step {step} (norm of the gradient {float(grad_norm):.3g}; last '
                    f'looked at within {recipe.log_every} steps). The checkpoints in {folder / "checkpoints"} are as '
                    'they were. Try a smaller --lr or --precision fp32.'
                )
            step, tokens = step + 1, tokens + recipe.batch_size * count_tokens(model)
            task.update_ema(step=step)

            # the clock
            tock = time.perf_counter()
            minutes, tick = minutes + (tock - tick) / 60, tock
            progress = minutes / recipe.max_minutes if recipe.max_minutes else step / total

            # log, evaluate, save
            if step % recipe.log_every == 0 or progress >= 1:
                seconds = max((minutes - last_log[1]) * 60, 1e-9)
                images_per_s = (step - last_log[0]) * recipe.batch_size / seconds
                last_log = (step, minutes)
                scalars = {
                    'train/loss': float(loss),
                    'train/lr': optimizer.param_groups[0]['lr'],
                    'train/grad_norm': float(grad_norm),
                    'speed/images_per_s': images_per_s,
                    'speed/tokens_per_s': images_per_s * count_tokens(model),
                    'memory/peak_gib': peak_memory_gib(device),
                }
                board.log(step, min(progress, 1), scalars, minutes)
            if (
                val_batches is not None
                and recipe.eval_every
                and step % max(1, round(recipe.eval_every * len(train_batches))) == 0
            ):
                board.scores('val', step, evaluate(scored(task), val_batches, img_size, precision))
            if step % recipe.checkpoint_every == 0:
                save_checkpoint(folder / 'checkpoints', step, state())
            if interrupted() or recipe.max_steps and step >= recipe.max_steps and progress < 1:
                save_checkpoint(folder / 'checkpoints', step, state())
                board.say(f'stopped after {step} steps as asked; the same command goes on')
                board.close()
                return {}
            tick = time.perf_counter()
            if progress >= 1 or stage != stage_at(stages, progress):
                break

    # ---------------------------------------------------------------------------------------------- score and export
    save_checkpoint(folder / 'checkpoints', step, state())
    final = scored(task)
    board.say(f'{step} steps are taken; scoring')
    if val_batches is not None:
        scores['val'] = evaluate(final, val_batches, stages[-1][0])
        board.scores('val', step, scores['val'])
    if recipe.test:
        test_set = create_dataset(recipe.dataset, recipe.data_dir, 'test', recipe.download)
        test_batches = DeviceBatches(test_set, recipe.eval_batch_size, mean, std, device)
        scores['test'] = evaluate(final, test_batches, stages[-1][0])
        board.scores('test', step, scores['test'])
    export_model(final, folder / 'model', train_set, mean, std)
    board.close()
    images_seen = step * recipe.batch_size
    metrics = {
        **scores.get('test', {}),
        **{f'val_{k}': v for k, v in scores.get('val', {}).items()},
        'epochs': images_seen / len(train_set),
        'steps': step,
        'images_seen': images_seen,
        'train_minutes': minutes,
        'images_per_s': images_seen / (minutes * 60),
        'tokens_per_s': tokens / (minutes * 60),
        'tokens': count_tokens(model),
        'peak_memory_gib': peak_memory_gib(device),
        'num_parameters': sum(p.numel() for p in model.parameters()),
        'classes': list(train_set.classes),
        'weights': 'ema' if task.has_ema() else 'last',
        'schedule': 'minutes' if recipe.max_minutes else 'epochs',
        'precision': precision,
        'probe_seconds': probe,
        **describe(recipe, device),
    }
    part = folder / 'metrics.json.part'
    part.write_text(json.dumps(metrics, indent=2) + '\n')
    os.replace(part, folder / 'metrics.json')
    return metrics


def stage_at(stages: tuple[tuple[int, float], ...], progress: float) -> int:
    """The stage that a share of the run belongs to; a share on the boundary belongs to the later one."""
    ends = np.cumsum([share for _, share in stages])
    return min(int(np.searchsorted(ends, progress + 1e-9, side='right')), len(stages) - 1)


def update(
    task: ClassificationTask,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    labels: Tensor,
    precision: str,
    clip_grad: float,
) -> tuple[Tensor, Tensor]:
    """One step: forward, backward, clip, update.

    Returns:
        The loss and the norm of the gradient before it was clipped, detached.
    """
    with autocast(images.device, precision):
        loss = task(images, labels)['loss']
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(task.get_trainable_module().parameters(), clip_grad or float('inf'))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), grad_norm


def describe(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it: the recipe, the machine and the versions."""
    return {
        'recipe': recipe.to_dict(),
        'seed': recipe.seed,
        'device': torch.cuda.get_device_name(device)
        if device.type == 'cuda'
        else f'{device.type} {platform.machine()}',
        'threads': torch.get_num_threads(),
        'versions': {
            'python': platform.python_version(),
            'torch': torch.__version__,
            'torchvision': torchvision.__version__,
            'timm': timm.__version__,
            'linvision': __version__,
        },
    }


def scored(task: ClassificationTask) -> nn.Module:
    """The model that is scored and exported: the moving average where there is one."""
    return task.get_trainable_module(ema=True).module if task.has_ema() else task.get_trainable_module()


def change_size(
    recipe: Recipe, task: ClassificationTask, optimizer: torch.optim.Optimizer, img_size: int
) -> torch.optim.Optimizer:
    """Another image size for the model and its moving average.

    Returns:
        An optimizer over the present parameters; the moments of those that were not replaced are carried over.
    """
    model = task.get_trainable_module()
    set_size(model, img_size)
    if task.has_ema():
        set_size(task.get_trainable_module(ema=True).module, img_size)
    new = create_optimizer(recipe, model)
    carry_state(optimizer, new, model)
    return new


def restore(
    found: dict[str, Any], task: ClassificationTask, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Put a checkpoint's state into the model, its moving average, the optimizer and the loss scaler."""
    task.get_trainable_module().load_state_dict(found['model'])
    if task.has_ema():
        task.get_trainable_module(ema=True).module.load_state_dict(found['ema'])
    optimizer.load_state_dict(found['optimizer'])
    scaler.load_state_dict(found['scaler'])
