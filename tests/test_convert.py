"""Conversion: what it must not change, what it must refuse, and what fitting E is worth."""

import copy
import json
import runpy
from functools import partial
from itertools import repeat
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.layers import GluMlp, RmsNorm, SwiGLU
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from linvision.analysis.watched import watched
from linvision.cli import convert
from linvision.cli.images import ImagesOf
from linvision.cli.pretrained import load_vit
from linvision.convert import agreement, fit_projection, from_vit
from linvision.data import create_batches, create_dataset
from linvision.train import Recipe, train

SMALL = {'img_size': 32, 'patch_size': 8, 'embed_dim': 48, 'depth': 2, 'num_heads': 2, 'num_classes': 7}
VITS = {  # timm's names, each for a part that others lack
    'vit_tiny_patch16_224': {},
    'deit3_small_patch16_224': {},  # layer scale, positions without the class token
    'vit_small_patch14_dinov2': {},  # layer scale
    'vit_small_patch14_reg4_dinov2': {},  # registers
    'vit_giant_patch14_dinov2': {'num_heads': 2},  # SwiGLU
    'vit_base_patch16_siglip_224': {},  # attention pooling, no class token
    'vit_base_patch32_clip_224': {},  # norm before the blocks, no bias in the patch embedding
    'vit_base_patch32_clip_quickgelu_224': {},  # its own activation, epsilon 1e-5
    'vit_medium_patch16_gap_240': {},  # mean pooling
    'test_vit2': {},
}
REFUSED = {
    'vit_base_patch16_rpn_224': 'a block',
    'deit_tiny_distilled_patch16_224': 'the model',
    'beit_base_patch16_224': 'the model',
    'test_linformer_vit': 'already',
}


def vit(name='vit_tiny_patch16_224', **arguments):
    """A plain ViT whose every weight is random: nothing is zero or one by its start."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **arguments}).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float('norm' in name and 'weight' in name), 0.2)
    return model


def images(count=4, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('name', VITS)
@torch.no_grad()
def test_without_a_projection_the_converted_model_equals_the_original(name):
    original = vit(name, **VITS[name])
    converted = from_vit(original, projection='none')
    torch.testing.assert_close(converted(images()), original(images()), rtol=1e-4, atol=1e-4)
    assert agreement(converted, original, [images()])['relative_error'] < 1e-5


@pytest.mark.parametrize('kind', ['linear', 'separable', 'conv', 'mean_pool', 'max_pool'])
@pytest.mark.parametrize('sharing', ['layerwise', 'headwise', 'none'])
@torch.no_grad()
def test_with_as_many_rows_as_tokens_projected_attention_equals_the_original(kind, sharing, monkeypatch):
    original = vit(reg_tokens=2)
    converted = from_vit(original, 16, kind, sharing)
    for block in converted.blocks:
        monkeypatch.setattr(block.attn, 'is_full', lambda grid: False)
    torch.testing.assert_close(converted(images()), original(images()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pooling_attends_to_the_means_of_cells():
    original = vit(depth=1, class_token=False, global_pool='avg')
    converted = from_vit(original, 4)
    ((x, _),) = watched(original, [b.attn for b in original.blocks], images(2))
    query, key, value = original.blocks[0].attn.qkv(x).unflatten(-1, (3, 2, 24)).unbind(2)  # (B, N, H, D/H)
    cells = [[r * 4 + c for r in rows for c in columns] for rows in ((0, 1), (2, 3)) for columns in ((0, 1), (2, 3))]
    key, value = (torch.stack([y[:, cell].mean(1) for cell in cells], 1).transpose(1, 2) for y in (key, value))
    weights = (query.transpose(1, 2) @ key.transpose(-1, -2) / 24**0.5).softmax(-1)
    wanted = original.blocks[0].attn.proj((weights @ value).transpose(1, 2).flatten(2))
    ((_, found),) = attention_of_converted(converted, x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def attention_of_converted(model, x):
    tensors = model.projection_tensors(x, model.patch_embed.grid_size)
    return [(x, b.attn(x, own, model.patch_embed.grid_size)) for b, own in zip(model.blocks, tensors, strict=True)]


@pytest.mark.parametrize(
    ('kind', 'sharing'),
    [('linear', 'layerwise'), ('separable', 'key_value'), ('conv', 'none'), ('dynamic', 'layerwise')],
)
def test_fitting_brings_outputs_nearer_and_changes_nothing_but_the_projection(kind, sharing):
    original = vit()
    converted = from_vit(original, 4, kind, sharing)
    before = {k: v.clone() for k, v in converted.state_dict().items()}
    pooled = agreement(converted, original, [images(16)])
    errors = fit_projection(converted, original, repeat(images(16)), steps=60, lr=0.01)
    fitted = agreement(converted, original, [images(16)])
    assert len(errors) == 60 and errors[-1] < 0.97 * errors[0]
    assert fitted['relative_error'] < pooled['relative_error'] and fitted['num_samples'] == 16
    changed = {k for k, v in converted.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if k.startswith('projection.')}
    assert all(p.grad is None for p in converted.parameters()) and all(p.grad is None for p in original.parameters())


def test_the_first_error_of_fitting_is_that_of_brute_force():
    original = vit(depth=1)
    converted = from_vit(original, 4)
    ((x, wanted),) = watched(original, [b.attn for b in original.blocks], images(2))
    ((_, found),) = attention_of_converted(converted, x)
    (error,) = fit_projection(converted, original, [images(2)])
    assert error == pytest.approx(((found - wanted).norm() / wanted.norm()).item(), rel=1e-4)


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_converted_is_refused_with_its_reason(name):
    model = timm.create_model(name)
    with pytest.raises(ValueError, match=REFUSED[name]):
        from_vit(model)


def test_other_norms_are_refused():
    norm = vit()
    norm.blocks[1].norm1.eps = 1e-3
    with pytest.raises(ValueError, match='blocks.1.norm1 cannot be converted.*eps=0.001'):
        from_vit(norm)


def test_an_argument_that_contradicts_the_original_is_refused():
    with pytest.raises(ValueError, match='depth is 2 in the original, and cannot become 3'):
        from_vit(vit(), depth=3)
    with pytest.raises(ValueError, match='token_norm is False in the original, and cannot become True'):
        from_vit(vit(), token_norm=True)


@torch.no_grad()
def test_conv_is_refused_where_cells_do_not_divide_the_grid_and_pools_to_means_where_they_do():
    original = vit(img_size=(112, 96), depth=1)  # 14 × 12 tokens
    with pytest.raises(ValueError, match=r'\(14, 12\), and those of proj_len=16 do not.*: 1, 2, 3, 4, 6, 8, 84\.'):
        from_vit(original, 16, 'conv')
    x = torch.randn(2, 168, 48)
    for K in (1, 2, 3, 4, 6, 8, 84, 56):  # 56: 7 × 6 cells, fewer than 7 × 8
        conv, mean = (from_vit(original, K, kind).projection for kind in ('conv', 'mean_pool'))
        rows = (p.kind.reduce(x, p(x, p.grid)[0][:-1], p.grid, p.row_grids[0]) for p in (conv, mean))
        torch.testing.assert_close(*rows)


def test_there_is_nothing_to_fit_without_parameters_or_with_full_attention():
    with pytest.raises(ValueError, match='no parameters'):
        fit_projection(from_vit(vit(), 4, 'mean_pool'), vit(), [images()])
    with pytest.raises(ValueError, match='not below the 16 tokens'):
        fit_projection(from_vit(vit(), 16), vit(), [images()])
    with pytest.raises(ValueError, match='fitted in fp32, and the weights are torch.float16: call float'):
        fit_projection(from_vit(vit(), 4).half(), vit().half(), [images().half()])


@torch.no_grad()
def test_another_image_size_is_that_of_timms_own_resizing():
    original = vit()
    converted = from_vit(original, projection='none', img_size=64)
    original.set_input_size((64, 64))
    torch.testing.assert_close(converted(images(2, 64)), original(images(2, 64)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_vit_that_no_factory_made_is_converted():
    original = VisionTransformer(**SMALL).eval()
    torch.testing.assert_close(from_vit(original, projection='none')(images()), original(images()))


@pytest.mark.parametrize('size', [(32, 32), (32, 128), (48, 64)])
@torch.no_grad()
def test_positions_that_are_not_square_become_those_of_timms_own_resizing(size):
    original = vit(img_size=(16, 64))
    converted = from_vit(original, projection='none', img_size=size)
    original.set_input_size(size)
    assert torch.equal(converted.pos_embed, original.pos_embed)


@torch.no_grad()
def test_a_converted_model_is_saved_and_loaded_with_the_originals_data_config(tmp_path):
    original = vit('deit3_small_patch16_224')
    original.pretrained_cfg = {**original.pretrained_cfg, 'mean': (0.1, 0.2, 0.3), 'crop_pct': 0.8}
    converted = from_vit(original, 4, sharing='key_value')
    assert resolve_model_data_config(converted)['input_size'] == (3, 32, 32)
    save_for_hf(converted, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(images()), converted(images()))
    ours, theirs = resolve_model_data_config(loaded), resolve_model_data_config(original)
    assert all(tuple(ours[k]) == tuple(theirs[k]) for k in ('mean', 'std'))
    assert all(ours[k] == theirs[k] for k in ('crop_pct', 'crop_mode', 'interpolation'))
    assert ours['input_size'] == (3, 32, 32) and ours['crop_pct'] == 0.8
    assert json.loads((tmp_path / 'config.json').read_text())['model_args']['proj_len'] == 4


@pytest.mark.parametrize(
    'name, arguments',
    [
        *VITS.items(),
        ('vit_tiny_patch16_224', {'mlp_layer': SwiGLU, 'norm_layer': partial(RmsNorm, eps=1e-5)}),
        ('vit_tiny_patch16_224', {'mlp_layer': GluMlp, 'norm_layer': torch.nn.LayerNorm, 'act_layer': 'gelu_tanh'}),
    ],
)
@torch.no_grad()
def test_every_architecture_that_is_converted_can_be_saved_and_loaded(name, arguments, tmp_path):
    original = vit(name, **arguments)
    converted = from_vit(original, projection='none')
    torch.testing.assert_close(converted(images()), original(images()), rtol=1e-4, atol=1e-4)
    save_for_hf(converted, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert str(loaded.blocks) == str(converted.blocks)
    assert torch.equal(loaded(images()), converted(images()))


def test_a_registered_name_stands_for_a_vit_of_its_size():
    converted = from_vit(timm.create_model('vit_tiny_patch16_224'))
    assert converted.pretrained_cfg['architecture'] == 'linformer_vit_tiny_patch16_224'
    small = from_vit(timm.create_model('vit_tiny_patch16_224', img_size=64, patch_size=4, depth=2))
    assert small.pretrained_cfg['architecture'] == 'linformer_vit_tiny_patch16_224'


@pytest.fixture(scope='module')
def vit_folder(tmp_path_factory):
    """A plain ViT that has learnt the fake set (grey, 16×16), as a run exports it."""
    folder = tmp_path_factory.mktemp('vit')
    small = {'patch_size': 2, 'embed_dim': 32, 'depth': 2, 'num_heads': 2}
    train(
        Recipe().replace(
            model='vit_tiny_patch16_224',
            model_args=small,
            dataset='fake',
            output_dir=folder,
            epochs=6,
            lr=3e-3,
            device='cpu',
            precision='fp32',  # the same model on every processor: whether pooling suits it is chance
        )
    )
    return folder


def test_the_command_converts_a_runs_model_and_reports_what_evaluation_finds(vit_folder, tmp_path, capsys):
    convert.main(str(vit_folder), tmp_path, proj_len=4, dataset='fake', steps=100, lr=0.01, device='cpu')
    report = json.loads((tmp_path / 'conversion.json').read_text())
    said = capsys.readouterr().out
    assert f'outputs differ by {100 * report["fitted"]["relative_error"]:.1f} %' in said and 'K = 4' in said
    assert report['tokens'] == 64
    assert report['fitted']['relative_error'] < report['pooled']['relative_error']
    original, converted = (
        timm.create_model(f'local-dir:{folder}', pretrained=True) for folder in (vit_folder / 'model', tmp_path)
    )
    config = resolve_model_data_config(original)
    test = create_dataset('fake', '', 'test')
    batches = create_batches(test, len(test), config['mean'], config['std'], torch.device('cpu'))
    found = agreement(converted, original, (x for x, _ in batches.ordered(16)))
    assert found['num_samples'] == len(test) and found['same_top1'] == report['fitted']['same_top1']
    assert found['relative_error'] == pytest.approx(report['fitted']['relative_error'], rel=1e-4)
    assert converted.pretrained_cfg['label_names'] == original.pretrained_cfg['label_names']


def test_the_command_takes_timms_own_folders_a_k_for_each_layer_and_leaves_out_bad_images(tmp_path, capsys, caplog):
    shape = {'in_chans': 1, 'num_classes': 2, 'img_size': 32, 'patch_size': 4}
    original = timm.create_model('test_vit', **shape)
    save_for_hf(original, str(tmp_path / 'vit'), model_args=shape, safe_serialization=False)  # pytorch_model.bin
    for i in range(20):
        (tmp_path / 'images' / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new('L', (32, 32), 10 * i).save(tmp_path / 'images' / 'ab'[i % 2] / f'{i:02}.png')
    for bad in ('a/08.png', 'b/01.png'):  # of the test, and of training
        (tmp_path / 'images' / bad).write_bytes(b'no image')
    lengths = tuple(range(4, 4 + len(original.blocks)))
    flags = {'data_dir': tmp_path / 'images', 'steps': 3, 'batch_size': 4, 'device': 'cpu', 'sharing': 'key_value'}
    with pytest.raises(OSError, match='on-bad-image skip'):
        convert.main(str(tmp_path / 'vit'), tmp_path / 'out', proj_len=lengths, **flags)
    convert.main(str(tmp_path / 'vit'), tmp_path / 'out', proj_len=lengths, on_bad_image='skip', **flags)
    report = json.loads((tmp_path / 'out/conversion.json').read_text())
    assert report['proj_len'] == list(lengths) and report['pooled']['num_samples'] == 3  # a fifth of 20, but for one
    worse = report['fitted']['relative_error'] > report['pooled']['relative_error']
    assert ('further from the original than pooling' in caplog.text) == worse
    saved = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    fresh = from_vit(timm.create_model(f'local-dir:{tmp_path / "vit"}', pretrained=True), lengths, sharing='key_value')
    pooled = all(map(torch.equal, saved.projection.parameters(), fresh.projection.parameters()))
    assert pooled == worse
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert [block.attn.rows[0] * block.attn.rows[1] for block in loaded.blocks] == list(lengths)


def test_the_command_refuses_unknown_models_and_other_channels(vit_folder, tmp_path):
    with pytest.raises(ValueError, match="'vit_nowhere' is neither a folder nor a name"):
        convert.main('vit_nowhere', tmp_path)
    with pytest.raises(ValueError, match='takes 3 channels, but the images of fake have 1'):
        save_for_hf(timm.create_model('test_vit'), str(tmp_path / 'rgb'), safe_serialization=True)
        convert.main(str(tmp_path / 'rgb'), tmp_path / 'out', dataset='fake', device='cpu')


def test_weights_that_cannot_be_fetched_may_come_from_a_file(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError('no network here')

    monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf', refuse)
    with pytest.raises(OSError, match='vit_tiny_patch16_224 cannot be loaded: no network here.*--checkpoint FILE'):
        convert.main('vit_tiny_patch16_224', tmp_path)


def test_distillation_from_the_original_brings_a_conversion_back_to_it(vit_folder, tmp_path, capsys):
    convert.main(str(vit_folder), tmp_path / 'converted', proj_len=4, dataset='fake', steps=0, device='cpu')
    before = json.loads((tmp_path / 'converted/conversion.json').read_text())['pooled']
    recipe = runpy.run_path(str(Path(__file__).parents[1] / 'recipes/distill_from_vit.py'))['RECIPE']
    changes = {'dataset': 'fake', 'epochs': 8, 'augmentation': 'torchvision', 'hflip': 0.0, 'device': 'cpu'}
    changes |= {'init': str(tmp_path / 'converted'), 'teacher': str(vit_folder), 'output_dir': tmp_path / 'run'}
    train(recipe.replace(**changes))
    original, student = (
        timm.create_model(f'local-dir:{folder}', pretrained=True)
        for folder in (vit_folder / 'model', tmp_path / 'run/model')
    )
    images = ImagesOf(original, 'fake', tmp_path, 32, torch.device('cpu'))
    after = agreement(student, original, images.test(0))
    assert student.blocks[0].attn.rows == (2, 2)
    assert after['relative_error'] < 0.7 * before['relative_error'] and after['same_top1'] > before['same_top1']


def test_the_weights_of_a_file_fit_another_image_size(tmp_path):
    original = timm.create_model('vit_tiny_patch16_224', depth=1).eval()
    save_file(original.state_dict(), tmp_path / 'vit.safetensors')
    loaded = load_vit('vit_tiny_patch16_224', str(tmp_path / 'vit.safetensors'), 64, depth=1)
    wanted = copy.deepcopy(original)
    wanted.set_input_size((64, 64))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(x), wanted(x))
    same = load_vit('vit_tiny_patch16_224', str(tmp_path / 'vit.safetensors'), 0, depth=1)
    assert torch.equal(same(torch.ones(1, 3, 224, 224)), original(torch.ones(1, 3, 224, 224)))
