"""Every registered name: its size by closed formula, a step of training, and its line in `docs/models.md`."""

import math
from pathlib import Path

import pytest
import timm
import torch

from linvision.cli import models as model_table

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = {'pico': (64, 4), 'tiny': (192, 12), 'small': (384, 12), 'base': (768, 12), 'large': (1024, 24)}  # D, layers
ROWS = {  # K
    **{f'linformer_vit_{size}_patch1_32': 64 for size in ('pico', 'tiny', 'small')},
    'linformer_vit_pico_patch2_32': 64,
    'linformer_vit_pico_patch2_64': 64,
    'linformer_vit_pico_patch4_32': 16,
    'linformer_vit_tiny_patch2_32': 64,
    **{f'linformer_vit_{size}_patch1_{n}': 256 for size in ('pico', 'tiny', 'small') for n in (64, 128, 256)},
    **{f'linformer_vit_{size}_patch1_224': 256 for size in ('tiny', 'small', 'base')},
    **{f'linformer_vit_{size}_patch{p}_224': 256 for size in ('tiny', 'small', 'base') for p in (2, 4)},
    'linformer_vit_small_patch2_512': 256,
    'linformer_vit_base_patch4_1024': 256,
    **{f'linformer_vit_{size}_patch8_224': 128 for size in ('tiny', 'small', 'base', 'large')},
    **{f'linformer_vit_{size}_patch16_224': 64 for size in ('tiny', 'small', 'base', 'large')},
}
NAMES = sorted(timm.list_models('*linformer_vit*'))


def tokens(name: str) -> int:
    if name == 'test_linformer_vit':
        return 256
    patch, image = name.split('_')[3:]
    return (int(image) // int(patch[5:])) ** 2


def table_in_the_docs() -> dict[str, str]:
    """Lines of `docs/models.md` by name."""
    lines = (ROOT / 'docs' / 'models.md').read_text().splitlines()
    return {line.split('`')[1]: line for line in lines if line.startswith('| `')}


def parameters(patch_size: int, N: int, K: int, D: int, layers: int, mlp_ratio: int = 4) -> int:
    """Parameters for 3 channels and 1,000 classes, from the definition of the two families."""
    norms, attention = 4 * D, 4 * D * D + 4 * D
    mlp = 2 * mlp_ratio * D * D + mlp_ratio * D + D
    count = 3 * patch_size**2 * D + D  # patch embedding
    count += layers * (norms + attention + mlp)
    count += 2 * D + D * 1000 + 1000  # norm and classifier
    if patch_size <= 4:  # separable E, positions and local paths by 3×3 convolutions
        return count + 2 * math.isqrt(K) * math.isqrt(N) + 9 * D + layers * 9 * D
    return count + K * N + D + (N + 1) * D  # linear E, class token, table of positions


def test_every_registered_name_is_counted():
    assert set(NAMES) == {'test_linformer_vit', *ROWS}


@pytest.mark.parametrize('name', NAMES)
def test_parameter_count_follows_the_closed_formula(name):
    with torch.device('meta'):
        model = timm.create_model(name, in_chans=3, num_classes=1000)
    if name == 'test_linformer_vit':
        expected, K = parameters(1, 256, 16, 32, 3, mlp_ratio=2), 16
    else:
        size, patch = name.split('_')[2:4]
        K = ROWS[name]
        expected = parameters(int(patch[5:]), tokens(name), K, *WIDTHS[size])
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model.patch_embed.num_patches == tokens(name)
    assert K <= tokens(name) / 3 and all(math.prod(block.attn.rows) == K for block in model.blocks)
    assert model.blocks[0].attn.head_dim == (16 if name == 'test_linformer_vit' else 32 if '_pico_' in name else 64)


def marked(name: str):
    """The name, marked slow where its model is large, or has many tokens."""
    large = '_base_' in name or '_large_' in name or tokens(name) > (300 if '_small_' in name else 1024)
    return pytest.param(name, marks=pytest.mark.slow) if large else name


@pytest.mark.parametrize('name', [marked(name) for name in NAMES if tokens(name) <= 4096])
def test_name_runs_forward_and_backward(name):
    model = timm.create_model(name, in_chans=3, num_classes=3)
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.projection.weights[0].grad.any()


@pytest.mark.parametrize('size', ['tiny', 'small', 'base', 'large'])
@pytest.mark.parametrize('patch', [8, 16])
def test_state_of_timms_vit_fits_but_for_the_projection(size, patch):
    with torch.device('meta'):
        ours = timm.create_model(f'linformer_vit_{size}_patch{patch}_224').state_dict()
        name = f'vit_{size}_patch{patch}_224'
        if timm.is_model(name):
            plain = timm.create_model(name, num_classes=1000)
        else:  # timm has no tiny and no large ViT with patches of 8 pixels
            plain = timm.create_model(f'vit_{size}_patch16_224', patch_size=patch)
    theirs = plain.state_dict()
    assert {k: v.shape for k, v in ours.items() if not k.startswith('projection.')} == {
        k: v.shape for k, v in theirs.items()
    }


def test_pico_has_at_most_half_a_million_parameters_and_a_thousand_tokens():
    model = timm.create_model('linformer_vit_pico_patch1_32')
    assert sum(p.numel() for p in model.parameters()) <= 500_000
    assert model.patch_embed.num_patches == 1024


def test_table_in_the_docs_has_every_name_in_order():
    page = (ROOT / 'docs' / 'models.md').read_text()
    assert page.startswith(model_table.HEADER)
    assert list(table_in_the_docs()) == sorted(NAMES, key=model_table.key)


@pytest.mark.parametrize('name', [marked(name) for name in NAMES if tokens(name) <= 4096])
def test_line_in_the_docs_is_what_the_script_writes(name):
    assert table_in_the_docs()[name] == model_table.markdown(model_table.facts(name, multiply_adds=True))
