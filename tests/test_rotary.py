"""ViTs with rotary positions and gated attention (timm's `Eva`): what converts, and what E makes of rotated keys."""

from itertools import repeat

import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat
from timm.models import save_for_hf

from linvision.analysis.attention_map import attention_maps
from linvision.analysis.watched import watched
from linvision.convert import agreement, fit_projection, from_vit

SMALL = {'img_size': 32, 'patch_size': 8, 'embed_dim': 48, 'depth': 2, 'num_heads': 2, 'num_classes': 7}
NAMES = [  # timm's, each for a part that others lack
    'eva_giant_patch14_224',  # no rotary positions
    'eva02_tiny_patch14_224',  # SwiGLU, three layers for queries, keys and values, a table of positions too
    'eva02_base_patch14_448',  # norms inside attention and MLP
    'eva02_base_patch16_clip_224',
    'vit_medium_patch16_rope_reg1_gap_256',  # a register, mean pooling
    'vit_pe_spatial_tiny_patch16_512',  # a norm before the blocks
    'vit_small_patch16_rope_224',
    'vit_small_patch16_rope_mixed_224',  # frequencies that are learned, for each head of each layer
    'vit_small_patch16_rope_mixed_ape_224',
    'vit_small_patch16_dinov3',  # four registers, no biases of keys
    'vit_small_plus_patch16_dinov3',
    'vit_small_patch16_lingbot',
]
ROTARY = 'vit_small_patch16_dinov3'
MIXED = 'vit_small_patch16_rope_mixed_224'


def vit(name=ROTARY, **arguments):
    """One whose every weight is random, in fp64. Of any size: else rotations are kept in fp32, and cast."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, 'dynamic_img_size': True, **arguments}).eval().double()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float('norm' in name and 'weight' in name), 0.2)
    return model


def images(count=3, size=(32, 32)):
    return torch.randn(count, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model):
    model.zero_grad(set_to_none=True)
    model(images()).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_without_a_projection_a_converted_model_equals_the_original(name):
    original = vit(name)
    converted = from_vit(original, projection='none')
    for chunk_size in (0, 4):
        converted.set_chunk_size(chunk_size)
        torch.testing.assert_close(converted(images()), original(images()))
        wide = images(size=(24, 40))
        torch.testing.assert_close(converted(wide), original(wide))


@torch.no_grad()
def test_a_gate_is_converted():
    original = vit('vit_tiny_patch16_224', block_fn=GatedBlock)
    plain = timm.create_model('vit_tiny_patch16_224', **SMALL)
    assert any('gate' in name for name, _ in original.named_parameters()) and plain.blocks[0].attn.gate is None
    converted = from_vit(original, projection='none')
    for chunk_size in (0, 4):
        converted.set_chunk_size(chunk_size)
        torch.testing.assert_close(converted(images()), original(images()))


def GatedBlock(dim, num_heads, qkv_bias=False, **kwargs):
    block = timm.models.vision_transformer.Block(dim, num_heads, qkv_bias=qkv_bias, **kwargs)
    block.attn = timm.layers.Attention(dim, num_heads, qkv_bias=qkv_bias, gated=True)
    return block


@pytest.mark.parametrize('kind', ['linear', 'separable', 'mean_pool', 'max_pool'])
@pytest.mark.parametrize('sharing', ['layerwise', 'headwise', 'none'])
@pytest.mark.parametrize('name', [ROTARY, MIXED])
@torch.no_grad()
def test_with_as_many_rows_as_tokens_projected_attention_equals_the_original(name, kind, sharing, monkeypatch):
    original = vit(name)
    converted = from_vit(original, 16, kind, sharing)
    for block in converted.blocks:
        monkeypatch.setattr(block.attn, 'is_full', lambda grid: False)
    for chunk_size in (0, 4):
        converted.set_chunk_size(chunk_size)
        torch.testing.assert_close(converted(images()), original(images()))


@torch.no_grad()
def test_rotated_keys_are_projected_in_the_papers_order():
    original = vit(depth=1, class_token=False, num_reg_tokens=0, global_pool='avg')
    converted = from_vit(original, 4)
    ((x, _),) = watched(original, [b.attn for b in original.blocks], images())
    rope = original.rope.get_embed(shape=[4, 4])
    query, key, value = converted.blocks[0].attn.qkv(x).unflatten(-1, (3, 2, 24)).permute(2, 0, 3, 1, 4)
    query, key = (apply_rot_embed_cat(t, rope, half=True) for t in (query, key))
    E = converted.projection.weights[0].flatten(1)
    wanted = ((query @ (E @ key).mT / 24**0.5).softmax(-1) @ (E @ value)).transpose(1, 2).flatten(2)
    (tensors,) = converted.projection_tensors(x, (4, 4))
    found = converted.blocks[0].attn(x, tensors, (4, 4))
    torch.testing.assert_close(found, converted.blocks[0].attn.proj(wanted))


@pytest.mark.parametrize('kind, sharing', [('linear', 'layerwise'), ('separable', 'headwise'), ('dynamic', 'none')])
def test_streamed_and_whole_blocks_have_the_same_gradients(kind, sharing):
    converted = from_vit(vit(MIXED), 4, kind, sharing, chunk_size=0)
    wanted = gradients(converted)
    assert wanted['rope.freqs'].any() and all(g is not None for g in wanted.values())
    converted.set_chunk_size(4)
    torch.testing.assert_close(gradients(converted), wanted)


@pytest.mark.parametrize('kind', ['linear', 'mean_pool'])
@torch.no_grad()
def test_padding_counts_nothing(kind):
    converted = from_vit(vit(), 4, kind)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, 2:] = True
    noisy = images()
    noisy[:, :, 16:] = 100.0
    for chunk_size in (0, 4):
        converted.set_chunk_size(chunk_size)
        clean, other = (converted(x, key_padding_mask=mask.flatten(1)) for x in (images(), noisy))
        torch.testing.assert_close(clean, other)
    assert not torch.equal(clean, converted(images()))


def test_fitting_brings_outputs_nearer():
    original = vit()
    converted = from_vit(original, 4)
    before = agreement(converted, original, [images(8)])['relative_error']
    errors = fit_projection(converted, original, repeat(images(8)), steps=40, lr=0.01)
    assert errors[-1] < 0.97 * errors[0]
    assert agreement(converted, original, [images(8)])['relative_error'] < before


@pytest.mark.parametrize('name', [ROTARY, MIXED, 'eva02_tiny_patch14_224'])
@torch.no_grad()
def test_a_converted_model_is_saved_loaded_and_looked_into(name, tmp_path):
    converted = from_vit(vit(name), 4).float()
    save_for_hf(converted, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(images().float()), converted(images().float()))
    assert attention_maps(loaded, images().float()).shape == (3, 4, 4)


@pytest.mark.parametrize(
    'name, arguments, words',
    [
        ('eva02_enormous_patch14_clip_224', {}, 'has its norms after its branches'),
        ('vit_base_patch16_sapiens2', {'num_kv_heads': (1, 2)}, 'groups of heads share keys'),
        (
            'vit_pe_core_tiny_patch16_384',
            {},
            'attn_pool cannot be converted: it has 8 heads, and a Linformer ViT has 2',
        ),
    ],
)
def test_what_has_no_equal_is_refused(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        from_vit(timm.create_model(name, **SMALL, **arguments))


@pytest.mark.parametrize(
    'arguments, words',
    [
        ({'rope': {'rope_type': 'mrope'}}, "'rope_type' of cat, mixed, dinov3"),
        ({'rope': {'rope_type': 'cat'}, 'projection': 'conv'}, "projection='conv' needs sharing='none'"),
        ({'rope': {'rope_type': 'cat'}, 'projection': 'none', 'patch_drop_rate': 0.1}, 'patch_drop_rate must be 0'),
        ({'rope': {'rope_type': 'cat', 'scale': 2}}, "arguments of timm.layers.create_rope_embed.*'scale': 2"),
        ({'rope': {'rope_type': 'cat'}, 'embed_dim': 36, 'num_heads': 6}, 'multiple of 4 channels, got .* 36 and'),
        ({'rope': 'cat'}, "rope must be a mapping with a 'rope_type'"),
    ],
)
def test_rotary_positions_that_cannot_be_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        timm.create_model('test_linformer_vit', **{'local_size': 0, **arguments})
