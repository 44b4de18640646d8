"""What a run will do and need, in words, before it does it: `linvision train NAME --dry-run`."""

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler.scheduler import Scheduler
from torch.utils.flop_counter import FlopCounterMode

from linvision.streaming.chunk_size import kept_bytes, whole_blocks
from linvision.train.data import TrainingData
from linvision.train.learner import Learner
from linvision.train.model import can_stream, count_tokens, empty_model
from linvision.train.parallel import Processes
from linvision.train.precision import DTYPES
from linvision.train.recipe import Recipe

# numbers for each token and channel that a streamed block needs: its output, two gradients; with `token_norm` also the
# tokens before the MLP and their gradient
STREAMED = {False: 3, True: 5}
MOMENTS = 2  # numbers that AdamW and its like keep for each parameter


def plan(recipe: Recipe, data: TrainingData, learner: Learner, processes: Processes, updates: int) -> str:
    """Model, tokens, multiply-adds, memory, steps and schedule of a run."""
    parameters = sum(p.numel() for p in learner.model.parameters())
    images = recipe.images_at_once(processes.shares)
    batch, optim, length = recipe.data, recipe.optim, recipe.run
    lines = [
        f'model        {recipe.model}, {parameters:,} parameters, {learner.precision}',
        f'data         {data.title}: {len(data.train_set):,} images, {len(data.train_set.classes)} classes'
        + (f', {data.validation.order.n:,} more for validation' if data.validation else ''),
        f'batch        {batch.batch_size} images = {processes.shares} processes × {batch.accumulate} parts × {images}'
        + f', each image in {processes.sequence} processes' * (processes.sequence > 1),
        f'optimizer    {optim.opt}, learning rate {optim.lr:g}, {optim.sched}, warm-up {100 * optim.warmup:g} %',
    ]
    start = 0.0
    for img_size, fraction in data.stages:
        model = empty_model(recipe, data.shape, data.stages[-1][0], img_size)
        end, tokens = start + fraction, count_tokens(model)
        held = held_bytes(recipe, parameters, processes.count)
        kept = kept_for_backward(
            recipe, model, images / processes.sequence, DTYPES[learner.precision], processes.device
        )
        lines.append(
            f'stage        {100 * start:.0f}–{100 * end:.0f} %: {img_size}×{img_size} pixels, {tokens:,} tokens, '
            f'{multiply_adds(model) / 1e9:.2f} G multiply-adds for an image forward, about '
            f'{(held + kept) / 2**30:.2f} GiB above the data'
        )
        start = end
    if length.max_minutes:
        lines.append(f'length       {length.max_minutes:g} minutes of training')
    else:
        lines.append(f'length       {updates:,} steps, {length.epochs:g} passes over the images')
    lines.append(f'learning rate {", ".join(rates(learner.schedule, learner.optimizer, updates))}')
    return '\n'.join(lines)


def multiply_adds(model: VisionTransformer) -> int:
    """Those of one image forward; `model` is on the meta device, and learns nothing after this."""
    model.requires_grad_(False)  # torch's counter stumbles over a parameter that is expanded, as the pool 'map' has one
    image = torch.empty(1, model.patch_embed.proj.in_channels, *model.patch_embed.img_size, device='meta')
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops() // 2


def held_bytes(recipe: Recipe, parameters: int, processes: int) -> float:
    """Weights, gradients, moments and moving average, in fp32, that one process holds."""
    copies = 2 + MOMENTS + (recipe.optim.ema_decay > 0)
    return 4 * parameters * copies / (processes if recipe.run.parallel == 'fsdp' else 1)


def kept_for_backward(
    recipe: Recipe, model: VisionTransformer, images: float, dtype: torch.dtype, device: torch.device
) -> float:
    """Bytes that the backward pass needs of so many images, or parts of one, at the model's present size."""
    run, depth = recipe.run, len(model.blocks)
    numbers = round(images * count_tokens(model) * model.embed_dim)
    token_norm = getattr(model, 'token_norm', False)
    one = kept_bytes(numbers, 1, dtype, device, token_norm)
    whole = whole_blocks(numbers, depth, dtype, device, token_norm) if run.chunk_size == 'auto' else 0
    if can_stream(model) and run.chunk_size != 0 and whole < depth:
        # all of those that run whole, the input of each other in fp32, and what one is at
        return whole * one + (depth - whole + STREAMED[token_norm]) * numbers * 4
    if run.grad_checkpointing:
        # the input of each block, and all of one
        return depth * numbers * 4 + one
    return depth * one


def rates(schedule: Scheduler, optimizer: torch.optim.Optimizer, updates: int) -> list[str]:
    """The learning rate at some moments of the run."""
    words = []
    for moment in (0.0, 0.05, 0.25, 0.5, 0.75, 1.0):
        schedule.step(int(moment * updates))
        words.append(f'{max(group["lr"] for group in optimizer.param_groups):.2g} at {100 * moment:.0f} %')
    schedule.step(0)
    return words
