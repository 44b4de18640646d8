"""Every illegal argument of a model is refused by its name, before timm or torch meets it."""

import math

import pytest
import timm
import torch

from linvision.models.checks import CHOICES, LAYERS, RULES

NAN, INF = math.nan, math.inf
SIZE = 'must be a positive integer of at most 65,536, or two of them'
ILLEGAL = [
    ('img_size', (8, 8, 8), SIZE),
    ('img_size', (8,), SIZE),
    ('img_size', 0, SIZE),
    ('img_size', True, SIZE),
    ('patch_size', (1, 1, 1), SIZE),
    ('patch_size', (0, 1), SIZE),
    ('patch_size', '1', SIZE),
    ('local_grid', (1, 2, 3), 'must be 0, or a positive integer'),
    ('local_grid', -4, 'must be 0, or a positive integer'),
    ('num_heads', 0, 'must be a positive integer of at most 1,048,576, got 0'),
    ('num_heads', 2.0, 'must be a positive integer'),
    ('embed_dim', 0, 'must be a positive integer'),
    ('embed_dim', -64, 'must be a positive integer'),
    ('depth', 0, 'must be a positive integer'),
    ('in_chans', -1, 'must be a positive integer'),
    ('num_classes', -1, 'must be an integer of at least 0'),
    ('reg_tokens', -1, 'must be an integer of at least 0'),
    ('class_token', 2, 'must be True or False, got 2'),
    ('qkv_bias', 'yes', 'must be True or False'),
    ('fc_norm', 'yes', 'must be True, False or None'),
    ('mlp_ratio', 0.01, 'must give some hidden channels'),
    ('mlp_ratio', 0, 'must be a finite number above 0'),
    ('mlp_ratio', INF, 'must be a finite number above 0'),
    ('drop_path_rate', 2, 'must be a number from 0 to below 1'),
    ('drop_path_rate', 1.0, 'must be a number from 0 to below 1'),
    ('patch_drop_rate', -0.5, 'must be a number from 0 to below 1'),
    ('drop_rate', NAN, 'must be a number from 0 to 1'),
    ('attn_drop_rate', 1.5, 'must be a number from 0 to 1'),
    ('proj_drop_rate', '0.1', 'must be a number from 0 to 1'),
    ('pos_drop_rate', -1, 'must be a number from 0 to 1'),
    ('norm_eps', NAN, 'must be a finite number of at least 0'),
    ('norm_eps', -1e-6, 'must be a finite number of at least 0'),
    ('init_values', NAN, 'must be a finite number, or None'),
    ('device', 'gpu', "must be a torch device, such as 'cpu'"),
    ('dtype', torch.int8, 'must be a floating-point torch.dtype'),
    ('dtype', 'float32', 'must be a floating-point torch.dtype'),
    ('chunk_size', -1, "must be 'auto', 0 or a number of tokens"),
    ('chunk_size', True, "must be 'auto', 0 or a number of tokens"),
    ('norm_layer', 'layernrm', "Unknown norm_layer 'layernrm'. Nearest: layernorm"),
    ('norm_layer', 5, 'must be a class or a name'),
    ('embed_norm_layer', 'batchnorm', "Unknown embed_norm_layer 'batchnorm'"),
    ('act_layer', 'gello', "Unknown act_layer 'gello'. Nearest: gelu"),
    ('mlp_layer', 5, 'must be a class or a name'),
    ('weight_init', 'jux', "Unknown weight_init 'jux'. Nearest: jax"),
    ('global_pool', 'averag', "Unknown global_pool 'averag'. Nearest: avg"),
    ('global_pool', 1, 'Unknown global_pool 1'),
    ('pos_embed', ['conv'], 'Unknown pos_embed'),
    ('sharing', ['headwise'], 'Unknown sharing'),
    ('projection', ['linear'], 'Unknown projection'),
]


@pytest.mark.parametrize('name, value, words', ILLEGAL, ids=lambda v: repr(v)[:30])
def test_an_illegal_argument_is_refused_by_name(name, value, words):
    with pytest.raises(ValueError) as error:
        timm.create_model('test_linformer_vit', **{name: value})
    assert name in str(error.value) and words in str(error.value)


HUGE = 10**30


@pytest.mark.parametrize(
    'name', ['depth', 'img_size', 'patch_size', 'embed_dim', 'num_heads', 'in_chans', 'num_classes', 'reg_tokens',
             'proj_len', 'local_grid', 'mlp_ratio'],
)  # fmt: skip
@pytest.mark.parametrize('value', [10**9, HUGE])
def test_absurd_sizes_are_refused_by_name_and_bound(name, value):
    bounds = {'depth': '10,000', 'img_size': '65,536', 'patch_size': '65,536', 'local_grid': '65,536'}
    with pytest.raises(ValueError, match=rf'{name} .*at most {bounds.get(name, "1,048,576")}.*, got {value}'):
        timm.create_model('test_linformer_vit', **{name: value})


TOO_LARGE = [
    (dict(embed_dim=2**20, num_heads=2**14), 'depth 3, embed_dim 1048576'),
    (dict(depth=10_000, embed_dim=65_536), 'depth 10000, embed_dim 65536'),
    (dict(img_size=65_536, patch_size=1, proj_len=64), 'img_size 65536, patch_size 1, proj_len'),
    (dict(img_size=65_536, patch_size=1, projection='conv'), 'img_size 65536, patch_size 1. '),
    (dict(proj_len=2**20, img_size=1024, patch_size=1), 'proj_len 1048576'),
    (dict(num_classes=2**20, embed_dim=2**14), 'embed_dim 16384, num_classes 1048576'),
    (dict(patch_size=2**15, img_size=2**15, in_chans=2**10), 'patch_size 32768, in_chans 1024'),
    (dict(local_size=2**15 + 1), 'local_size 32769'),
]


@pytest.mark.parametrize('sizes, words', TOO_LARGE, ids=lambda v: str(v)[:40])
def test_a_model_that_no_memory_holds_is_refused_before_it_is_made(sizes, words, monkeypatch):
    monkeypatch.setattr('linvision.models.checks.installed_gib', lambda: 8.0)
    with pytest.raises(ValueError, match='the machine has 8.0 GiB of memory') as refused:
        timm.create_model('test_linformer_vit', **{'pos_embed': 'learn', 'projection': 'linear', **sizes})
    assert words in str(refused.value)


def test_a_model_without_memory_may_have_any_size():
    with torch.device('meta'):
        assert timm.create_model('test_linformer_vit', img_size=65_536, patch_size=1, depth=1).num_classes


def test_rules_are_for_arguments_that_there_are_and_hold_for_their_defaults():
    import inspect

    from timm.models.vision_transformer import VisionTransformer

    from linvision.models.linformer_vit import LinformerVisionTransformer

    known = dict(inspect.signature(VisionTransformer).parameters)
    known |= inspect.signature(LinformerVisionTransformer).parameters
    assert {*RULES, *CHOICES, *LAYERS} <= set(known)
    assert all(rule.holds(known[name].default) for name, rule in RULES.items())
    assert all(known[name].default in choices for name, choices in CHOICES.items())


@pytest.mark.parametrize('names', LAYERS.values(), ids=LAYERS)
def test_every_name_of_a_layer_makes_a_model(names, request):
    argument = request.node.callspec.id
    for name in names:
        model = timm.create_model('test_linformer_vit', img_size=4, patch_size=1, depth=1, **{argument: name})
        assert model(torch.zeros(1, 3, 4, 4)).isfinite().all(), name


@pytest.mark.parametrize('out_indices', [(0, 9), (), 4, 0, 'all', (0.5,), (-4,)])
def test_indices_of_blocks_are_those_that_there_are(out_indices):
    with pytest.raises(ValueError, match='Of 3 blocks, the indices of some must be given'):
        timm.create_model('test_linformer_vit', depth=3, features_only=True, out_indices=out_indices)
    model = timm.create_model('test_linformer_vit', depth=3)
    with pytest.raises(ValueError, match='Of 3 blocks'):
        model.forward_intermediates(torch.zeros(1, 3, 16, 16), indices=out_indices)
    with pytest.raises(ValueError, match='Of 3 blocks'):
        model.prune_intermediate_layers(out_indices)


def test_features_of_a_model_that_is_less_deep_than_its_name():
    model = timm.create_model('linformer_vit_pico_patch4_32', depth=1, features_only=True)
    assert len(model(torch.zeros(1, 3, 32, 32))) == 1


def test_what_is_changed_later_is_checked_too():
    model = timm.create_model('test_linformer_vit')
    with pytest.raises(ValueError, match='num_classes must be an integer of at least 0 .*, got -1'):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match='Unknown global_pool'):
        model.reset_classifier(3, 'averag')
    with pytest.raises(ValueError, match='needs a class token'):
        model.reset_classifier(3, 'token')
    with pytest.raises(ValueError, match='img_size must be a positive integer'):
        model.set_input_size(0)
    with pytest.raises(ValueError, match='patch_size must be a positive integer'):
        model.set_input_size(patch_size=(1, 2, 3))
