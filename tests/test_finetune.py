"""Starting from other weights: whose model it is, what is kept, what does not learn."""

import json
import shutil

import pytest
import timm
import torch
from runs import assert_stops_change_nothing, small, weights
from timm.models import save_for_hf

from linvision.cli import evaluate
from linvision.models.local_conv import LocalPath
from linvision.train import train
from linvision.train.model import create_model, empty_model, resolved
from linvision.train.pretrained import load_backbone
from linvision.train.recipe import Recipe


def finetuned(model_folder, folder, **changes):
    """A run from the weights in a folder; those, and those that it left."""
    settings = {
        'model': '',
        'init': str(model_folder),
        'epochs': 0.5,
        'lr': 0.01,
        'stages': (),
        'test': False,
        **changes,
    }
    train(small(folder, **settings))
    before = timm.create_model(f'local-dir:{model_folder}', pretrained=True).state_dict()
    return before, weights(folder)


def changed(before, after):
    return {k for k in after if not torch.equal(before[k], after[k])}


def test_a_model_of_no_squares_is_scored_and_trained_at_a_size_that_is_named(tmp_path):
    sizes = {'img_size': (24, 16), 'num_classes': 10, 'in_chans': 1}
    folder = tmp_path / 'model'
    model = timm.create_model('test_linformer_vit', **sizes)
    save_for_hf(model, str(folder), model_config={'model_args': sizes}, safe_serialization=True)
    words = r'images of 24×16 pixels.*--img-size 24'
    with pytest.raises(ValueError, match=words):
        resolved(Recipe(model='', init=str(folder)))
    with pytest.raises(ValueError, match=words):
        evaluate.main(str(folder), dataset='fake', device='cpu')
    evaluate.main(str(folder), dataset='fake', device='cpu', img_size=16, limit=4)
    assert resolved(Recipe().replace(model='', init=str(folder), img_size=16)).data.img_size == 16


def test_a_recipe_without_a_model_takes_that_of_its_weights(model_folder):
    recipe = resolved(Recipe(model='', init=str(model_folder), model_args={'local_size': 3}))
    assert recipe.model == 'test_linformer_vit' and recipe.data.img_size == 16
    assert recipe.model_args == {'global_pool': 'avg', 'local_size': 3}
    recipe = resolved(Recipe(model='', init='linformer_vit_pico_patch1_32.fashion_mnist').replace(stages=((16, 1.0),)))
    assert recipe.model == 'linformer_vit_pico_patch1_32' and not recipe.data.img_size
    with pytest.raises(ValueError, match='names no model: say --init'):
        resolved(Recipe(model=''))
    with pytest.raises(ValueError, match="'nowhere': it is neither a folder"):
        resolved(Recipe(model='', init='nowhere'))


def test_arguments_of_the_weights_model_come_with_it(tmp_path):
    train(small(tmp_path / 'first', epochs=0.2, test=False, model_args={'proj_len': 9, 'projection': 'separable'}))
    recipe = resolved(Recipe(model='', init=str(tmp_path / 'first')))
    assert recipe.model_args['proj_len'] == 9 and recipe.model_args['projection'] == 'separable'
    assert not {'img_size', 'in_chans', 'num_classes'} & set(recipe.model_args)


def test_a_head_comes_along_only_with_the_norm_before_it(tmp_path):
    classes = tuple(train(small(tmp_path / 'run', epochs=0.2, test=False, model_args={'head_norm': True}))['classes'])
    source = timm.create_model(f'local-dir:{tmp_path}/run/model', pretrained=True).state_dict()
    assert source['head_norm.running_mean'].any()
    for head_norm in (True, False):
        recipe = Recipe(model='test_linformer_vit', model_args={'head_norm': head_norm})
        model = create_model(recipe, {'in_chans': 1, 'num_classes': 10}, 16)
        load_backbone(model, str(tmp_path / 'run'), classes)
        found = model.state_dict()
        different = {k for k in found if not torch.equal(found[k], source[k])}
        assert different == (set() if head_norm else {'head.weight', 'head.bias'})


@pytest.mark.parametrize('classes, words', [(True, 'kept: its classes are the same'), (False, 'new')])
def test_the_log_says_whether_the_head_is_kept(model_folder, tmp_path, classes, words, capsys):
    task = 'classify' if classes else 'masked_pixels'  # of the same set, or of pixels
    finetuned(model_folder, tmp_path / 'run', epochs=0.2, task=task)
    assert f'weights from {model_folder}; the head is {words}' in capsys.readouterr().out.splitlines()


def test_convolutions_of_a_larger_model_span_as_much_of_the_image_as_those_of_its_weights():
    source = 'linformer_vit_pico_patch1_32.fashion_mnist'
    recipe = resolved(Recipe(model='linformer_vit_pico_patch1_64', init=source, model_args={'proj_len': 64}))
    model = create_model(recipe, {'in_chans': 1, 'num_classes': 10}, 64).eval()
    images = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        load_backbone(model, source)
        expected = timm.create_model(source, pretrained=True, img_size=64).eval().forward_features(images)
        torch.testing.assert_close(model.forward_features(images), expected, rtol=1e-4, atol=1e-4)
    own = Recipe(model='linformer_vit_pico_patch1_64', init=source, model_args={'local_grid': 64})
    assert resolved(own).model_args == {'local_grid': 64}  # what a recipe says is left alone
    plain = Recipe(model='vit_tiny_patch16_224', init=source)
    assert resolved(plain) == plain


@pytest.mark.parametrize(
    'model, stages, model_args, grid',
    [
        ('linformer_vit_pico_patch1_32', ((16, 0.5), (32, 0.5)), {}, 16),
        ('linformer_vit_tiny_patch4_224', ((112, 0.5), (224, 0.5)), {}, 28),
        ('linformer_vit_pico_patch1_32', ((16, 0.5), (32, 0.5)), {'local_grid': 32}, 32),
        ('linformer_vit_pico_patch1_32', ((32, 1.0),), {}, None),
        ('linformer_vit_pico_patch1_32', ((32, 0.5), (16, 0.5)), {}, None),
        ('linformer_vit_pico_patch1_32', ((16, 0.5), (32, 0.5)), {'local_size': 0, 'pos_embed': 'learn'}, None),
        ('vit_tiny_patch16_224', ((112, 0.5), (224, 0.5)), {}, None),
    ],
)
def test_convolutions_keep_their_span_where_the_images_of_a_recipe_grow(model, stages, model_args, grid):
    recipe = Recipe(model=model, model_args=model_args).replace(stages=stages)
    assert resolved(recipe).model_args == (model_args if grid is None else {**model_args, 'local_grid': grid})
    assert resolved(resolved(recipe)) == resolved(recipe)


def test_convolutions_of_a_run_reach_as_far_in_its_last_stage_as_in_its_first(tmp_path):
    train(small(tmp_path / 'run', epochs=0.3, test=False, model_args={'local_size': 3}))
    model = timm.create_model(f'local-dir:{tmp_path}/run/model', pretrained=True)
    paths = [module for module in model.modules() if isinstance(module, LocalPath)]
    assert paths and all(path.step((8, 8)) == (1, 1) and path.step((16, 16)) == (2, 2) for path in paths)


def test_weights_decide_the_span_before_the_first_stage_does(tmp_path):
    source = 'linformer_vit_pico_patch1_32.fashion_mnist'
    recipe = Recipe(model='linformer_vit_pico_patch1_64', init=source).replace(stages=((16, 0.5), (64, 0.5)))
    grids = [m.grid for m in timm.create_model(source).modules() if isinstance(m, LocalPath)]
    assert resolved(recipe).model_args['local_grid'] == grids[0]
    unnamed = resolved(recipe.replace(model=''))
    assert [m.grid for m in empty_model(unnamed, {}).modules() if isinstance(m, LocalPath)] == grids


@pytest.mark.parametrize('stages', [(), ((8, 0.5), (16, 0.5))])
def test_a_linear_probe_changes_nothing_but_the_head(model_folder, tmp_path, stages):
    before, after = finetuned(model_folder, tmp_path / 'run', freeze=-1, stages=stages, ema_decay=0.9)
    resized = {'projection.weights.0', 'projection.weights.1'} if stages else set()
    assert changed(before, after) - resized == {'head.weight', 'head.bias'}
    if stages:  # what was resized, twice, did not learn either: it is what resizing alone makes of it
        model = timm.create_model(f'local-dir:{model_folder}', pretrained=True)
        for size in (8, 16):
            model.set_input_size((size, size))
        assert all(torch.allclose(after[k], model.state_dict()[k], atol=1e-6) for k in resized)


@pytest.mark.parametrize('model', ['', 'test_linformer_vit'])
def test_a_run_whose_first_weights_are_gone_goes_on_and_is_reported(model_folder, tmp_path, model):
    source = tmp_path / 'first'
    shutil.copytree(model_folder, source)
    recipe = small(tmp_path / 'run', model=model, init=str(source), epochs=0.6, stages=())
    assert train(recipe.replace(max_steps=2, checkpoint_every=1, model_args={'row_norm': True} if model else {})) == {}
    (source / 'model.safetensors').unlink()  # as where that run was started again
    if model:
        with pytest.raises(ValueError, match="model_args: .*'row_norm': True.* there"):
            train(recipe)
        recipe = recipe.replace(model_args={'row_norm': True})
    newest = max((tmp_path / 'run/checkpoints').glob('step_*')) / 'state.pt'
    newest.write_bytes(newest.read_bytes()[:1000])
    assert train(recipe.replace(max_steps=1)) == {}
    shutil.rmtree(source)
    with pytest.raises(ValueError, match='No weights to start from'):
        train(recipe.replace(output_dir=tmp_path / 'other'))
    with pytest.raises(ValueError, match='holds a run of other settings'):
        train(recipe.replace(lr=0.1))
    metrics = train(recipe)
    shutil.rmtree(tmp_path / 'run/checkpoints')
    assert train(recipe) == json.loads(json.dumps(metrics)) and metrics['num_samples'] == 100


def test_frozen_blocks_and_what_stands_before_them_stay(model_folder, tmp_path):
    before, after = finetuned(model_folder, tmp_path / 'run', freeze=1)
    parts = {k.partition('.')[0] + ('.' + k.split('.')[1] if k.startswith('blocks') else '') for k in before}
    assert {'patch_embed', 'position', 'projection', 'blocks.0', 'blocks.1'} <= parts
    learnt = changed(before, after)
    assert all(k.startswith(('blocks.1', 'blocks.2', 'norm', 'fc_norm', 'head')) for k in learnt)
    assert {'blocks.1.attn.qkv.weight', 'blocks.1.mlp.fc1.weight', 'head.weight'} <= learnt


def test_as_many_frozen_blocks_as_there_are_and_no_more(model_folder, tmp_path):
    with pytest.raises(ValueError, match='freeze must be at most the 3 blocks that there are, got 4'):
        finetuned(model_folder, tmp_path / 'run', freeze=4)
    with pytest.raises(ValueError, match='freeze must be at least -1, got -2'):
        small(tmp_path, freeze=-2).validate()


def test_the_head_comes_where_the_classes_are_the_same(model_folder, tmp_path):
    before, after = finetuned(model_folder, tmp_path / 'same', lr=0.0)
    assert not changed(before, after)
    before, after = finetuned(model_folder, tmp_path / 'other', lr=0.0, dataset_args={'num_classes': 7})
    assert after['head.weight'].shape[0] == 7
    after = {k: v for k, v in after.items() if not k.startswith('head.')}
    assert not changed(before, after)


def test_a_resumed_run_leaves_frozen_what_was(model_folder, tmp_path):
    settings = {'freeze': 1, 'test': False, 'epochs': 0.5}
    before, straight = finetuned(model_folder, tmp_path / 'straight', **settings)
    recipe = small(tmp_path / 'run', model='', init=str(model_folder), lr=0.01, stages=(), **settings)
    assert train(recipe.replace(max_steps=2)) == {}
    train(recipe)
    assert not changed(straight, weights(tmp_path / 'run'))


def test_a_plain_vit_can_be_finetuned(tmp_path):
    small_vit = {'patch_size': 4, 'embed_dim': 32, 'depth': 2, 'num_heads': 2}
    train(
        small(tmp_path / 'vit', model='vit_tiny_patch16_224', model_args=small_vit, stages=(), epochs=0.2, test=False)
    )
    before, after = finetuned(tmp_path / 'vit' / 'model', tmp_path / 'run', freeze=-1)
    assert changed(before, after) == {'head.weight', 'head.bias'}
    metrics = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    assert (
        metrics['recipe']['model'] == 'vit_tiny_patch16_224'
        and small_vit.items() <= metrics['recipe']['model_args'].items()
    )


def test_a_run_from_weights_that_stops_before_its_images_grow_keeps_their_projection(small_recipe, tmp_path):
    """In the first stage K = N, and E is idle: one of a new model would start anew once the images grow."""
    model = timm.create_model('test_linformer_vit', in_chans=1, num_classes=10, proj_len=64)
    save_for_hf(model, tmp_path / 'source', safe_serialization=True)
    recipe = small_recipe.replace(init=str(tmp_path / 'source'), model_args={'proj_len': 64}, epochs=0.75, test=False)
    assert_stops_change_nothing(recipe, tmp_path / 'parts', 1)
