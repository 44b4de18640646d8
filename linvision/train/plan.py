"""What a run will do and need, in words, before it does it: `python recipes/X.py --dry-run`."""

from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from linvision.models.linformer_vit import LinformerVisionTransformer
from linvision.streaming.chunks import kept_bytes, whole_bytes
from linvision.train.precision import DTYPES
from linvision.train.setup import count_tokens, create_model, set_size

if TYPE_CHECKING:
    from linvision.train.loop import Run

STREAMED = 3  # numbers for each token and channel that a streamed block needs: its output, two gradients
MOMENTS = 2  # numbers that AdamW and its like keep for each parameter


def plan(run: 'Run') -> str:
    """Model, tokens, multiply-adds, memory, steps and schedule of a run."""
    recipe, learner = run.recipe, run.learner
    parameters = sum(p.numel() for p in learner.model.parameters())
    share = recipe.share(run.processes.count)
    lines = [
        f'model        {recipe.model}, {parameters:,} parameters, {learner.precision}',
        f'data         {recipe.dataset}: {len(run.data.train_set):,} images, {len(run.data.train_set.classes)} classes'
        + (f', {run.data.validation.order.n:,} more for validation' if run.data.validation else ''),
        f'batch        {recipe.batch_size} images = {run.processes.count} processes × {recipe.accumulate} parts × '
        f'{share}',
        f'optimizer    {recipe.opt}, learning rate {recipe.lr:g}, {recipe.sched}, warm-up {100 * recipe.warmup:g} %',
    ]
    start = 0.0
    for img_size, part in run.data.stages:
        tokens, adds = count(run, img_size)
        what = f'{100 * start:.0f}–{100 * (start + part):.0f} %'
        start += part
        lines.append(
            f'stage        {what}: {img_size}×{img_size} pixels, {tokens:,} tokens, {adds / 1e9:.2f} G multiply-adds '
            f'for an image forward, about {memory_gib(run, parameters, tokens, share):.2f} GiB above the data'
        )
    if recipe.max_minutes:
        lines.append(f'length       {recipe.max_minutes:g} minutes of training')
    else:
        lines.append(f'length       {run.updates:,} steps, {recipe.epochs:g} passes over the images')
    lines.append(f'learning rate {", ".join(rates(run))}')
    return '\n'.join(lines)


def count(run: 'Run', img_size: int) -> tuple[int, int]:
    """Tokens, and multiply-adds of one image forward, counted on a model without data."""
    with torch.device('meta'):
        model = create_model(run.recipe, run.data.shape, run.data.stages[-1][0]).eval()
        set_size(model, img_size)
        image = torch.empty(1, run.data.shape['in_chans'], img_size, img_size)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(image)
    return count_tokens(model), counter.get_total_flops() // 2


def memory_gib(run: 'Run', parameters: int, tokens: int, share: int) -> float:
    """Weights, gradients, moments and moving average, and what the backward pass keeps of `share` images."""
    recipe, model = run.recipe, run.learner.model
    copies = 2 + MOMENTS + (recipe.ema_decay > 0)
    held = 4 * parameters * copies / (run.processes.count if recipe.parallel == 'fsdp' else 1)
    numbers, depth, dtype = share * tokens * model.embed_dim, len(model.blocks), DTYPES[run.learner.precision]
    kept = kept_bytes(numbers, depth, dtype, run.processes.device)
    streams = isinstance(model, LinformerVisionTransformer) and not (recipe.compile or model.token_norm)
    long = recipe.chunk_size == 'auto' and kept >= whole_bytes(run.processes.device)
    if streams and (long or recipe.chunk_size not in ('auto', 0)):
        kept = (depth + STREAMED) * numbers * 4  # the input of each block in fp32, and what one is at
    elif recipe.grad_checkpointing:
        kept = depth * numbers * 4 + kept_bytes(
            numbers, 1, dtype, run.processes.device
        )  # the input of each block, and all of one
    return (held + kept) / 2**30


def rates(run: 'Run') -> list[str]:
    """The learning rate at some moments of the run."""
    schedule, words = run.learner.schedule, []
    for share in (0.0, 0.05, 0.25, 0.5, 0.75, 1.0):
        schedule.step(int(share * run.updates))
        words.append(f'{max(g["lr"] for g in run.learner.optimizer.param_groups):.2g} at {100 * share:.0f} %')
    schedule.step(0)
    return words
