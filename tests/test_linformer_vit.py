"""The model as timm sees it: weights of plain ViTs, parameter counts, ways of running it, optimizers, files, errors."""

import copy
import itertools
import logging
import pickle
from pathlib import Path

import pytest
import timm
import torch
from runs import slow_but
from timm.layers import set_fused_attn
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from linvision.models.norms import TokenNorm
from linvision.models.projection import SHARING
from linvision.train.model import freeze

CREATE = dict(num_classes=5, img_size=8, proj_len=6, depth=3)
VIT = dict(img_size=(16, 24), patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5)  # 24 patches
TOKENS = [
    dict(class_token=True, global_pool='token'),
    dict(class_token=True, global_pool='avg', reg_tokens=2, no_embed_class=True, init_values=0.5),
    dict(class_token=False, global_pool='avg', qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    dict(class_token=False, global_pool='map', pre_norm=True),
]


def randomise(model: nn.Module) -> nn.Module:
    """Weights far from the initial ones: zeros and ones would hide what is left out."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def create(dtype=torch.float64, **kwargs):
    return randomise(timm.create_model('test_linformer_vit', **{**CREATE, **kwargs}, dtype=dtype)).eval()


def batch(n: int = 3, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, dtype=dtype)


def gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(images).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# Weights of a plain ViT


@pytest.mark.parametrize('tokens', TOKENS)
@pytest.mark.parametrize('K', [0, 24, 50])
def test_plain_vit_weights_give_its_logits_without_projection_or_with_k_not_below_n(tokens, K):
    plain = randomise(VisionTransformer(**VIT, **tokens)).eval()
    plain_arguments = dict(patch_size=4, local_size=0, pos_embed='learn', mlp_ratio=4)
    projection = dict(projection='linear', proj_len=K) if K else dict(projection='none')
    model = timm.create_model('test_linformer_vit', **{**VIT, **plain_arguments, **tokens, **projection}).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=K == 0)
    assert missing == (['projection.weights.0'] if K else []) and not unexpected
    images = torch.randn(4, 3, 16, 24)
    expected = plain(images)
    assert (model(images) - expected).norm() <= 1e-5 * expected.norm()
    features = plain.forward_features(images)
    assert (model.forward_features(images) - features).norm() <= 1e-5 * features.norm()


# Parameter counts


@pytest.mark.parametrize('sharing, matrices', [('layerwise', 1), ('key_value', 3), ('headwise', 6), ('none', 12)])
def test_paper_model_adds_only_its_matrices_to_a_plain_vit(sharing, matrices):
    arguments = dict(pos_embed='learn', local_size=0, class_token=True, reg_tokens=1, mlp_ratio=4)
    model = timm.create_model('test_linformer_vit', projection='linear', sharing=sharing, proj_len=10, **arguments)
    plain = VisionTransformer(16, 1, embed_dim=32, depth=3, num_heads=2, global_pool='avg', reg_tokens=1)
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == matrices * 10 * 256  # 3 layers, 2 heads


# Ways of running it


@pytest.mark.parametrize('kind', ['linear', 'separable', 'dynamic', 'none'])
@pytest.mark.parametrize('sharing', SHARING)
def test_fused_attention_equals_attention_written_out(kind, sharing):
    fused = create(projection=kind, sharing=sharing, class_token=True)
    set_fused_attn(False)
    written_out = create(projection=kind, sharing=sharing, class_token=True)
    assert [m.blocks[0].attn.fused_attn for m in (fused, written_out)] == [True, False]
    written_out.load_state_dict(fused.state_dict())
    torch.testing.assert_close(written_out(images := batch()), fused(images), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings('ignore:`torch.jit')  # timm's models promise TorchScript; torch announces its end
@pytest.mark.parametrize(
    'kind, sharing, fused',
    slow_but(
        [('separable', 'layerwise', True), ('separable', 'none', False), ('dynamic', 'none', True)],
        itertools.product(['separable', 'dynamic'], SHARING, [True, False]),
    ),
)
def test_torchscript_gives_the_same_logits(kind, sharing, fused, tmp_path):
    set_fused_attn(fused)
    options = dict(class_token=fused, token_norm=not fused, head_norm=not fused)
    model = create(projection=kind, sharing=sharing, depth=2, **options)
    torch.jit.script(model).save(str(tmp_path / 'model.pt'))
    loaded, images, mask = torch.jit.load(str(tmp_path / 'model.pt')), batch(), torch.rand(3, 64) < 0.3
    torch.testing.assert_close(loaded(images), model(images))
    torch.testing.assert_close(loaded(images, key_padding_mask=mask), model(images, key_padding_mask=mask))


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        pytest.param(dict(projection='linear', sharing='none', class_token=True), marks=pytest.mark.slow),
        dict(projection='dynamic', class_token=True),
        pytest.param(dict(token_norm=True, head_norm=True), marks=pytest.mark.slow),
    ],
)
def test_export_with_a_dynamic_batch_gives_the_same_logits(kwargs):
    model = create(depth=2, **kwargs)
    dynamic = ({0: torch.export.Dim('batch', min=1, max=1024)}, None, None)
    program = torch.export.export(model, (batch(3), None, False), dynamic_shapes=dynamic).module()
    for n in (1, 3, 8):
        torch.testing.assert_close(program(images := batch(n), None, False), model(images))


@pytest.mark.parametrize('class_token', [False, True])
def test_head_norm_is_batch_norm_of_the_pooled_features_and_touches_nothing_else(class_token):
    pool = dict(class_token=class_token, global_pool='token' if class_token else 'avg')
    model, images = create(head_norm=True, **pool), batch(6)
    plain = create(**pool)
    assert plain.load_state_dict(model.state_dict(), strict=False).unexpected_keys == [
        f'head_norm.{name}' for name in ('running_mean', 'running_var', 'num_batches_tracked')
    ]
    features = plain.forward_head(plain.forward_features(images), pre_logits=True)
    spread = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
    model.train()
    torch.testing.assert_close(model(images), model.head(spread))
    model.eval()
    kept = (features - 0.1 * features.mean(0)) / (0.9 + 0.1 * features.var(0) + 1e-5).sqrt()
    torch.testing.assert_close(model(images), model.head(kept))
    model.reset_classifier(4, '')  # a head for every token
    torch.testing.assert_close(model(images), model.head(plain.fc_norm(plain.forward_features(images))))


def test_token_norm_is_instance_norm_over_the_tokens_of_an_image():
    model, images = create(token_norm=True), batch(4)
    seen = []
    for module in (model.blocks[1].norm1, model.blocks[1].norm2):
        module.register_forward_hook(lambda module, args, output: seen.append((module, args[0], output)))
    together = model(images)
    for norm, x, out in seen:
        assert x.shape == (4, 64, 32)
        expected = nn.functional.instance_norm(x.mT, weight=norm.weight, bias=norm.bias, eps=1e-5).mT
        torch.testing.assert_close(out, expected)
    assert len(seen) == 2
    wide = TokenNorm(5)
    x = 300 * torch.randn(1, 64, 5).half()  # whose squares fp16 does not hold
    torch.testing.assert_close(wide(x), wide(x.float()).half(), rtol=2e-3, atol=1e-3)
    exact = wide(x.float())
    for dtype in (torch.float16, torch.bfloat16):  # autocast narrows no sum
        with torch.autocast('cpu', dtype):
            torch.testing.assert_close(wide(x.float()), exact, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([model(image) for image in images.split(1)]), together)  # no batch norm


@pytest.mark.parametrize('sharing', SHARING)
def test_copies_are_equal_and_independent(sharing):
    model, images = create(sharing=sharing), batch()
    before = model(images)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(images), before)
        randomise(copied)
        assert not torch.allclose(copied(images), before)
        assert torch.equal(model(images), before)


@pytest.mark.parametrize('class_token', [False, True])
def test_intermediates_are_what_hooks_on_the_blocks_see(class_token):
    model, images = create(class_token=class_token, reg_tokens=1, fc_norm=False), batch()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    prefix = 1 + class_token
    final, maps = model.forward_intermediates(images, return_prefix_tokens=True)
    assert len(maps) == len(seen) == 3
    for (image, tokens), output in zip(maps, seen, strict=True):
        assert torch.equal(image.permute(0, 2, 3, 1).flatten(1, 2), output[:, prefix:])
        assert torch.equal(tokens, output[:, :prefix])
    assert torch.equal(final, model.norm(seen[2])) and torch.equal(final, model.forward_features(images))

    seen.clear()
    (tokens,) = model.forward_intermediates(
        images, indices=[1], norm=True, stop_early=True, output_fmt='NLC', intermediates_only=True
    )
    assert len(seen) == 2 and torch.equal(tokens, model.norm(seen[1])[:, prefix:])
    result = model.forward_intermediates(images, indices=1, output_dict=True, return_prefix_tokens=True)
    assert torch.equal(result['image_features'], final)
    assert torch.equal(result['image_intermediates'][0], maps[2][0])
    assert torch.equal(result['image_intermediates_prefix'][0], maps[2][1])


def test_features_only_gives_the_intermediates():
    model = timm.create_model('test_linformer_vit', **CREATE).eval()
    features = timm.create_model('test_linformer_vit', **CREATE, features_only=True, out_indices=(0, 2)).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    maps = model.forward_intermediates(images := batch(dtype=torch.float32), indices=[0, 2], intermediates_only=True)
    for ours, theirs in zip(features(images), maps, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('name', ['test_linformer_vit', 'linformer_vit_pico_patch1_32'])
def test_features_only_works_as_registered(name):
    features = timm.create_model(name, features_only=True).eval()
    images = torch.randn(1, *features.model.default_cfg['input_size'])
    maps = features(images)
    seen = []
    for block in features.model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    features(images)
    for image, output in zip(maps, seen[-len(maps) :], strict=True):
        assert torch.equal(image.permute(0, 2, 3, 1).flatten(1, 2), output)


@pytest.mark.parametrize('kind', ['linear', 'separable', 'dynamic'])
@pytest.mark.parametrize('sharing', SHARING)
def test_gradient_checkpointing_gives_the_same_gradients(kind, sharing):
    model, images = create(projection=kind, sharing=sharing, class_token=True).train(), batch()
    plain = gradients(model, images)
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))
    model.set_grad_checkpointing()
    for name, gradient in gradients(model, images).items():
        torch.testing.assert_close(gradient, plain[name])
    assert len(calls) == 2  # once more in the backward pass


@pytest.mark.parametrize('kind', ['linear', 'separable', 'dynamic'])
@pytest.mark.parametrize(
    'sharing, K',
    [(sharing, K) for sharing in SHARING for K in (6, 64, 100)]
    + [(sharing, (6, 64, 100)) for sharing in SHARING if sharing != 'layerwise'],
)
def test_every_parameter_gets_a_gradient(kind, sharing, K):
    model = create(projection=kind, sharing=sharing, proj_len=K, class_token=True).train()
    for name, gradient in gradients(model, batch()).items():
        assert gradient is not None, name
        if not name.startswith('projection.') or K == 6:
            assert gradient.any(), name


def test_model_with_k_not_below_n_grows_into_one_that_uses_its_projection(caplog):
    with caplog.at_level(logging.INFO, logger='linvision'):
        model = create(proj_len=64)
    assert caplog.text.count('3 of 3 layers run full attention') == 1
    gradient = gradients(model, batch())
    assert not any(gradient[f'projection.weights.{i}'].any() for i in (0, 1))
    caplog.clear()
    with caplog.at_level(logging.INFO, logger='linvision'):
        model.set_input_size((16, 16))
    assert 'full attention' not in caplog.text
    gradient = gradients(model, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    assert all(gradient[f'projection.weights.{i}'].any() for i in (0, 1))
    with caplog.at_level(logging.INFO, logger='linvision'):
        model.set_input_size((8, 8))
    assert caplog.text.count('3 of 3 layers run full attention') == 1
    assert not any(g is None for g in gradients(model, batch()).values())


# Optimizers


@pytest.mark.parametrize(
    'kind, pos_embed', [('separable', 'separable'), ('separable', 'conv'), ('separable', 'learn'), ('dynamic', 'conv')]
)
def test_projections_and_positions_are_spared_decay_and_muon(kind, pos_embed):
    model = create(projection=kind, pos_embed=pos_embed, sharing='headwise', class_token=True)
    special = {n for n, _ in model.named_parameters() if n.startswith(('projection.', 'position.', 'pos_embed'))}
    assert len(special) == 12 + {'separable': 2, 'conv': 1, 'learn': 1}[pos_embed]
    assert special <= model.no_weight_decay()
    optimizer = create_optimizer_v2(model, opt='muon', lr=0.01, weight_decay=0.1, fallback_no_weight_decay=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fallback = {names[id(p)] for g in optimizer.param_groups if g.get('use_fallback') for p in g['params']}
    decayed = {names[id(p)] for g in optimizer.param_groups if g['weight_decay'] > 0 for p in g['params']}
    assert special <= fallback and not special & decayed
    assert 'blocks.0.attn.qkv.weight' in decayed - fallback


def test_layer_decay_treats_projection_and_position_as_the_stem():
    model = create()
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    scales = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    assert scales['projection.weights.0'] == scales['position.local.weight'] == scales['patch_embed.proj.weight']
    assert scales['projection.weights.0'] < scales['blocks.0.attn.qkv.weight'] < scales['head.weight']


@pytest.mark.parametrize('sharing', ['key_value', 'headwise', 'none'])
def test_a_projection_of_one_layer_goes_with_its_block(sharing):
    model = create(projection='separable', sharing=sharing)
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    for layer, block in enumerate(model.blocks):
        own = [model.projection.weights[i] for i in model.projection.indices(layer)]
        assert own and {scale[id(weight)] for weight in own} == {scale[id(block.attn.qkv.weight)]}
    freeze(model, 1)
    kept = len(model.projection.indices(0))
    learning = [weight.requires_grad for weight in model.projection.weights]
    assert learning == [False] * kept + [True] * (len(learning) - kept)


# Files


@pytest.mark.parametrize(
    'kwargs, size',
    [
        (dict(), 0),
        (dict(), 16),
        (dict(sharing='none', projection='linear', proj_len=(4, 9, 80), pos_embed='learn', class_token=True), 0),
        (dict(projection='none', pos_embed='separable', in_chans=1), 12),
    ],
)
def test_saved_model_is_the_same_to_the_bit(kwargs, size, tmp_path: Path):
    model = create(dtype=torch.float32, **kwargs)
    if size:
        model.set_input_size((size, size))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.randn(3, model.in_chans, *model.patch_embed.img_size)
    assert torch.equal(loaded(images), model(images))


# Errors


@pytest.mark.parametrize(
    'kwargs, error, message',
    [
        (dict(projektion='linear'), TypeError, r"Unknown model argument 'projektion'. Nearest: projection"),
        (dict(proj_lenght=8), TypeError, r"Unknown model argument 'proj_lenght'. Nearest: proj_len"),
        (dict(depht=8), TypeError, r"Unknown model argument 'depht'. Nearest: depth"),
        (dict(embed_dim=32, num_heads=5), ValueError, r'divisible by num_heads, got 32 and 5'),
        (dict(img_size=10, patch_size=4), ValueError, r'multiple of the patch size, got \(10, 10\) and \(4, 4\)'),
        (dict(proj_len=0), ValueError, r'at least 1 and at most 1,048,576, got 0'),
        (dict(sharing='layerwise', proj_len=(4, 8, 8)), ValueError, r'K cannot differ by layer'),
        (dict(attn_layer='diff'), ValueError, r"attention is Linformer's, got 'diff'"),
        (dict(local_size=-1), ValueError, r'odd side of at most 65,536, got -1'),
        (dict(local_size=4), ValueError, r'odd side of at most 65,536, got 4'),
        (dict(local_size='3'), ValueError, r"local_size must be 0 or an odd side of at most 65,536, got '3'"),
        (dict(row_norm='yes'), ValueError, r"row_norm must be True or False, got 'yes'"),
        (dict(token_norm=1), ValueError, r'token_norm must be True or False, got 1'),
        (dict(token_norm=True, reg_tokens=1), ValueError, r'class_token must be False and reg_tokens 0, got 1'),
        (dict(mlp_layer='swiglue'), ValueError, r"Unknown mlp_layer 'swiglue'. Nearest: swiglu"),
        (dict(img_size=16.0), ValueError, r'img_size must be a positive integer.*got 16.0'),
        (dict(dynamic_img_pad=True), ValueError, r'dynamic_img_pad cannot be chosen'),
        (dict(block_fn=torch.nn.Identity), ValueError, r'block_fn cannot be chosen'),
        (dict(global_pool='token', class_token=False), ValueError, r"global_pool='token' needs a class token"),
        (dict(local_grid=(8, -1)), ValueError, r'local_grid must be 0, or a positive integer.*got \(8, -1\)'),
        (dict(patch_drop_rate=0.5), ValueError, r'patch_drop_rate must be 0.*got 0\.5'),
    ],
)
def test_wrong_arguments_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model('test_linformer_vit', **{**CREATE, **kwargs})


@pytest.mark.parametrize('shape', [(2, 3, 8, 9), (2, 3, 16, 16), (2, 1, 8, 9), (3, 8, 8)])
def test_wrong_images_are_refused_with_both_shapes(shape):
    message = rf'Expected images of shape \(B, 3, 8, 8\), got \[{", ".join(map(str, shape))}\].*set_input_size'
    with pytest.raises(ValueError, match=message):
        create()(torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize('shape', [(3, 8, 8), (2, 3, 8, 9), (2, 3, 8, 8, 1)])
def test_wrong_images_of_a_model_of_any_size_are_refused_with_their_shape(shape):
    message = rf'shape \(B, 3, height, width\).*got \[{", ".join(map(str, shape))}\]'
    with pytest.raises(ValueError, match=message):
        create(dynamic_img_size=True, patch_size=2, img_size=8)(torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize('dynamic', [False, True])
def test_images_of_other_channels_alone_are_told_of_channels_alone(dynamic):
    with pytest.raises(ValueError, match='^Expected 3 channels, got 1: convert the images, or .* in_chans=1.$'):
        create(dynamic_img_size=dynamic)(torch.randn(2, 1, 8, 8, dtype=torch.float64))


def test_dropped_patches_are_run_whole_and_refused_with_a_mask():
    model = create(projection='none', local_size=0, patch_drop_rate=0.5).train()
    images, found = batch(), []
    for chunk_size in (0, 16):
        model.set_chunk_size(chunk_size)
        torch.manual_seed(3)
        found.append(gradients(model, images))
    torch.testing.assert_close(*found)
    mask = torch.zeros(3, 64, dtype=torch.bool)
    with pytest.raises(ValueError, match=r'patch_drop_rate must be 0 with a key_padding_mask.*got 0\.5'):
        model(images, key_padding_mask=mask)
    torch.testing.assert_close(model.eval()(images, key_padding_mask=mask), model(images))


@pytest.mark.parametrize('method', ['forward', 'forward_features', 'forward_intermediates'])
def test_masks_are_refused(method):
    call = getattr(create(), method)
    with pytest.raises(ValueError, match='Causal attention is impossible'):
        call(batch(), is_causal=True)
    with pytest.raises(ValueError, match='attn_mask means nothing'):
        call(batch(), attn_mask=torch.ones(64, 64, dtype=torch.bool))


def test_blocks_become_half_precision_by_their_own_method():
    model = create(local_size=3)
    model.blocks.apply(lambda module: module.half())
    assert {p.dtype for p in model.blocks.parameters()} == {torch.float16}
