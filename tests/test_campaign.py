"""A campaign of odd settings of models and of command lines: each ends well, or in a sentence; and streamed is whole.

Slow; `campaigns.py` says how a seed is repeated.
"""

import math

import timm
import torch
from campaigns import FLAGS_OF_RUN, MARKS, campaign, ends_well, printed_seed  # noqa: F401
from hypothesis import strategies as st
from timm.layers import to_2tuple

from linvision.models.checks import CHOICES, LAYERS, RULES
from linvision.models.projection import SHARING
from linvision.models.projection_kinds import PROJECTIONS

pytestmark = MARKS
ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    0.5,
    -0.5,
    1.5,
    math.nan,
    math.inf,
    10**30,
    '',
    'x',
    '1',
    (),
    (1,),
    (2, 3),
    [4],
]


# ------------------------------------------------------------------------------------------------------------- models

LEGAL = {
    'img_size': [4, 8, (8, 4), (16, 1)],
    'patch_size': [1, 2, (2, 1)],
    'embed_dim': [8, 12],
    'depth': [1, 2],
    'num_heads': [1, 2, 4],
    'proj_len': [1, 5, 64],
    'local_size': [0, 1, 3],
    'local_grid': [0, 4, (2, 3)],
    'in_chans': [1, 3],
    'num_classes': [0, 5],
    'chunk_size': ['auto', 0, 3, 10**9],
    'reg_tokens': [0, 2],
    'mlp_ratio': [0.25, 1.5, 4],
    'dtype': [torch.float32],
    'device': ['cpu'],
}
FLAGS = ('class_token', 'row_norm', 'token_norm', 'head_norm', 'dynamic_img_size', 'qk_norm', 'pre_norm', 'final_norm')
ARGUMENTS = sorted({*LEGAL, *RULES, *CHOICES, *LAYERS, *FLAGS, 'projection', 'sharing', 'no_embed_class', 'qkv_bias'})


def values(name: str) -> st.SearchStrategy:
    """Values of an argument: three in four legal ones, where they are known, else odd ones."""
    odd = [value for value in ODD if name != 'device' or not isinstance(value, int)]  # 1 is the second GPU
    known = LEGAL.get(name) or CHOICES.get(name) or LAYERS.get(name)
    known = known or {'projection': [*PROJECTIONS, 'none'], 'sharing': list(SHARING)}.get(name, [True, False, 0.0])
    return st.integers(0, 3).flatmap(lambda die: st.sampled_from(list(known) if die else odd))


def is_named(name: str, value, words: str) -> bool:
    """Whether an error names an argument and says what came."""
    spelled = {'img_size': 'image size', 'patch_size': 'patch size'}.get(name, name)
    came = {
        repr(value),
        repr(to_2tuple(value)),
        *([f'{len(value)} lengths'] if isinstance(value, tuple | list) else []),
    }
    return (name in words or spelled in words) and any(each in words for each in came)


@campaign(250, data=st.data())
def test_a_model_is_made_and_runs_or_the_argument_is_named(data):
    names = data.draw(st.lists(st.sampled_from(ARGUMENTS), min_size=1, max_size=5, unique=True))
    arguments = {name: data.draw(values(name), label=name) for name in names}
    small_size = {'img_size': 8, 'patch_size': 1, 'depth': 1, 'embed_dim': 8, 'num_heads': 2, 'local_grid': 0}
    try:
        model = timm.create_model('test_linformer_vit', **{**small_size, **arguments}).eval()
    except (ValueError, TypeError) as error:
        assert any(is_named(name, value, str(error)) for name, value in arguments.items()), (arguments, error)
        return
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size)
    with torch.no_grad():
        out = model(images)
        absurd = abs(arguments.get('init_values') or 0) > 1e6  # a factor that fp32 cannot square
        assert out.shape[0] == 2 and (absurd or out.isfinite().all()), arguments
        assert model(images[:0]).shape[0] == 0


@campaign(60, data=st.data())
def test_streamed_equals_whole(data):
    draw = lambda name, *choices: data.draw(st.sampled_from(choices), label=name)  # noqa: E731
    grid = draw('grid', (16, 1), (1, 16), (5, 3), (8, 6), (1, 1))
    arguments = dict(
        projection=draw('projection', *PROJECTIONS, 'none'),
        sharing=draw('sharing', *SHARING),
        proj_len=draw('proj_len', 1, 4, 6, 64),
        local_size=draw('local_size', 0, 3, 5),
        local_grid=draw('local_grid', 0, 2, 16),
        pos_embed=draw('pos_embed', 'learn', 'conv', 'separable', 'none'),
        row_norm=draw('row_norm', False, True),
        **draw('tokens', {}, {'reg_tokens': 2}, {'token_norm': True}),
    )
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model = timm.create_model(
        'test_linformer_vit', img_size=grid, patch_size=1, num_classes=3, depth=2, dtype=torch.float64, **arguments
    )
    images = torch.randn(3, 3, *grid, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, grid[0] * grid[1]) < 0.3 if draw('masked', False, True) else None
    if mask is not None:
        mask[:, 0] = False
    found = []
    for chunk_size in (0, draw('chunk_size', 1, 7, 16, 1000)):
        model.set_chunk_size(chunk_size)
        logits = model(images, key_padding_mask=mask)
        found.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), images)))
    for whole, streamed in zip(*found, strict=True):
        torch.testing.assert_close(streamed, whole, rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------------------------- command lines

FLAG_VALUES = [
    '-1',
    '0',
    '1',
    '2.5',
    'nan',
    'inf',
    '1e300',
    '99999999999999999999',
    '',
    'x',
    'é',
    '8 0.5 16 0.5',
    '8 nan',
]
NUMBERS = ['epochs', 'lr', 'weight-decay', 'layer-decay', 'warmup', 'clip-grad', 'smoothing', 'ema-decay', 'mixup']
NUMBERS += ['cutmix', 'hflip', 'shift', 'rand-augment', 'color-jitter', 'erase', 'batch-size', 'accumulate', 'freeze']
NUMBERS += [
    'eval-batch-size',
    'workers',
    'threads',
    'seed',
    'img-size',
    'stages',
    'crop-scale',
    'chunk-size',
    'mask-size',
]
NUMBERS += ['val-fraction', 'max-steps', 'log-every', 'checkpoint-every', 'keep-checkpoints', 'eval-every', 'precision']
PAIRS = ['model-args num_heads', 'model-args proj_len', 'model-args global_pool', 'model-args drop_path_rate']
PAIRS += ['dataset-args num_classes', 'dataset-args img_size', 'dataset-args nothing', 'opt-args eps', 'opt-args betas']


@campaign(60, data=st.data())
def test_a_command_line_ends_well(data, tmp_path_factory):
    words = ['--dataset', 'fake', '--dry-run', '--output-dir', str(tmp_path_factory.mktemp('run') / 'out')]
    for flag in data.draw(st.lists(st.sampled_from([*NUMBERS, *PAIRS]), min_size=1, max_size=3, unique=True)):
        value = data.draw(st.sampled_from(FLAG_VALUES), label=flag)
        if flag in ('workers', 'threads') and value == '1':
            continue
        words += [*f'--{flag}'.split(' '), *(value.split(' ') if value else [''])]
    ends_well(['train', 'image_folder', *FLAGS_OF_RUN, '--data-dir', '.', *words])
