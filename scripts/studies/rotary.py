"""Rotary keys and E: keys of all tokens rotated and projected, or rows rotated at the mean position of their tokens.

    python -m scripts.studies.run rotary

A teacher, timm's Eva with rotary positions, is trained on CIFAR-10 in patches of 2×2 pixels (256 tokens) by
`recipes/cifar10_pixels_pico.py`, and converted with a linear E for each layer and K of 64 and of 16; E is fitted to the
teacher's attention on training images. In the paper's order, which linvision has, keys of all tokens are rotated, and
then E. The other way, which stands in this file alone, is E first: keys are made of K rows, and each is rotated at the
mean position of its tokens, weighted by the size of E's entries. One seed. Writes `results/rotary.json`, and its table
in `docs/results.md`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linvision.cli.images import ImagesOf
from linvision.cli.pretrained import load_vit
from linvision.convert import agreement, fit_projection, from_vit
from linvision.models.attention import LinformerAttention
from linvision.models.rotary import rotated
from linvision.train.evaluate import evaluate
from scripts.studies.tables import publish, table
from scripts.studies.trials import Flags, Trials, run_folder

RECIPE, TEACHER, LENGTHS = 'cifar10_pixels_pico', 'teacher', (64, 16)
SCORED = 2000  # test images


@dataclass
class Settings(Flags):
    """What the study can be asked.

    Args:
        minutes: Minutes of training of the teacher.
        steps: Steps of fitting E, a batch of 32 each.
    """

    minutes: float = 15.0
    steps: int = 400


class AtMeanPositions(LinformerAttention):
    """E first: keys of the K rows are rotated at the mean positions of their tokens. Not padded."""

    def key_value(
        self,
        x: Tensor,
        projection: list[Tensor],
        grid: tuple[int, int],
        valid: Tensor | None,
        weights: list[Tensor],
        rope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the prefix tokens and of the K rows."""
        assert valid is None and rope is not None and not self.is_full(grid)
        P, matrix = self.num_prefix_tokens, projection[0].flatten(1)  # (K, N)
        rows = [self.reduce_valid(x[:, P:], projection[:-1], grid, None)]
        key, value, mask = self.key_value_of_rows(rows, x[:, :P], projection, grid, None, weights)
        return rotated(key, at_mean_positions(rope, matrix, grid), self.rotate_half), value, mask


def at_mean_positions(rope: Tensor, matrix: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sines and cosines (N, 2 d) of a token grid at the mean positions of E's rows: (K, 2 d).

    Angles grow by the same step from row to row and from column to column, by less than half a turn.
    """
    sine, cosine = rope.chunk(2, dim=-1)
    angle = torch.atan2(sine, cosine).view(*grid, -1)
    steps = [(angle[1, 0] - angle[0, 0]), (angle[0, 1] - angle[0, 0])]
    down, right = ((step + math.pi) % (2 * math.pi) - math.pi for step in steps)
    share = matrix.abs() / matrix.abs().sum(1, keepdim=True)  # (K, N)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=share.dtype) for n in grid))
    y, x = (share @ places).unsqueeze(-1).unbind(1)  # (K, 1) each
    angle = angle[0, 0] + y * down + x * right
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def converted(teacher: Any, images: ImagesOf, K: int, mean: bool, steps: int) -> dict[str, Any]:
    """Scores of a conversion, E pooled and then fitted."""
    torch.manual_seed(0)
    model = from_vit(teacher, K, 'linear', 'key_value')
    for block in model.blocks if mean else []:
        block.attn.__class__ = AtMeanPositions

    def scores() -> dict[str, Any]:
        found = evaluate(model, images.batches('test', SCORED), images.size)
        return {'top1': found['top1'], **agreement(model, teacher, images.test(200))}

    pooled = scores()
    errors = fit_projection(model, teacher, images.training(0.0), steps)
    return {'pooled': pooled, 'attention_error': [errors[0], errors[-1]], 'fitted': scores()}


def rotary(settings: Settings) -> None:
    """Rotary keys and E: all rotated and projected, or rows rotated at the mean position of their tokens."""
    trials = Trials('rotary', settings, device='cpu')
    size = {'embed_dim': 64, 'depth': 4, 'num_heads': 2, 'patch_size': 2}
    teach = {'model': 'vit_medium_patch16_rope_reg1_gap_256', 'model_args': size, 'stages': ((32, 1.0),)}
    ((run,),) = trials.run(RECIPE, {TEACHER: {**teach, 'max_minutes': settings.minutes}}).values()
    teacher = load_vit(str(run_folder(trials.folder, TEACHER, 0)), '', 0)
    images = ImagesOf(teacher, 'cifar10', settings.data_dir, 32, torch.device('cpu'))
    ways = {'rotated, then E': False, 'E, then rotated at mean positions': True}
    rows = {
        (K, way): [converted(teacher, images, K, mean, settings.steps)] for K in LENGTHS for way, mean in ways.items()
    }
    columns = {
        'K': lambda key, _: str(key[0]),
        'keys': lambda key, _: key[1],
        'error of attention, pooled': lambda key, found: f'{found[key][0]["attention_error"][0]:.2f}',
        'fitted': lambda key, found: f'{found[key][0]["attention_error"][1]:.2f}',
        'top-1, pooled': lambda key, found: f'{100 * found[key][0]["pooled"]["top1"]:.1f} %',
        'top-1, fitted': lambda key, found: f'{100 * found[key][0]["fitted"]["top1"]:.1f} %',
    }
    result = {
        'teacher': run,
        'steps': settings.steps,
        'converted': {f'{way}, K = {K}': of for (K, way), of in rows.items()},
    }
    publish('rotary', result, table(columns, rows))
    print(f'teacher: {100 * run["top1"]:.1f} %')
