"""What lies at the edge of what a model takes: no images, huge chunks, thin grids, weights that nothing initialised."""

import pytest
import timm
import torch
from runs import small

from linvision.models.projection_kinds import PROJECTIONS
from linvision.train import Recipe, train
from linvision.train.plan import multiply_adds

EDGES = [
    dict(pos_embed='learn', projection='separable'),
    dict(pos_embed='separable', projection='linear', chunk_size=16),
    dict(pos_embed='conv', projection='max_pool', sharing='none', local_size=3),
    dict(pos_embed='none', projection='none', dynamic_img_size=True),
    dict(pos_embed='learn', dynamic_img_size=True, class_token=True, global_pool='map'),
    dict(pos_embed='none', projection='conv', token_norm=True),
    *[dict(pos_embed='learn', projection=kind, sharing='key_value', class_token=True) for kind in PROJECTIONS],
]


def create(**kwargs):
    arguments = dict(num_classes=5, img_size=(8, 6), patch_size=1, proj_len=6, local_grid=0)
    return timm.create_model('test_linformer_vit', **{**arguments, **kwargs})


@pytest.mark.parametrize('kwargs', EDGES, ids=str)
def test_no_images_give_no_logits(kwargs):
    model, images = create(**kwargs), torch.zeros(0, 3, 8, 6)
    logits = model(images)
    assert logits.shape == (0, 5)
    logits.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        assert model.eval()(images).shape == (0, 5)
    nothing_hidden = torch.zeros(0, 48, dtype=torch.bool)
    assert model.forward_features(images, key_padding_mask=nothing_hidden).shape[::2] == (0, model.embed_dim)


@pytest.mark.parametrize('chunk_size', [10**9, 10**30])
def test_a_chunk_may_be_larger_than_every_batch(chunk_size):
    model, images = create(img_size=16, chunk_size=chunk_size).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = model(images)
        model.set_chunk_size(0)
        torch.testing.assert_close(found, model(images), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('grid', [(16, 1), (1, 16), (1, 1)])
@pytest.mark.parametrize('projection', ['linear', 'conv', 'max_pool'])
def test_a_thin_grid_takes_every_sharing_and_a_local_path(grid, projection):
    for sharing in ('headwise', 'none'):
        for chunk_size in (0, 5):
            kwargs = dict(img_size=grid, sharing=sharing, projection=projection, local_size=3, chunk_size=chunk_size)
            model = create(proj_len=4, **kwargs)
            loss = model(torch.randn(2, 3, *grid)).square().sum()
            loss.backward()
            assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_skipped_initialisation_leaves_nothing_as_memory_was(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, 'empty', lambda *args, **kwargs: empty(*args, **kwargs).fill_(float('nan')))
    for kwargs in (dict(token_norm=True), dict(class_token=True, reg_tokens=2), dict(pos_embed='learn', local_size=3)):
        model = create(weight_init='skip', **kwargs)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_the_plan_counts_what_a_learned_pool_multiplies():
    with torch.device('meta'):
        mean, learned = create(), create(class_token=True, global_pool='map')
    assert multiply_adds(learned) > multiply_adds(mean)


def test_a_dry_run_takes_what_a_run_takes(tmp_path):
    recipe = small(tmp_path / 'run', model_args={'global_pool': 'map'}, stages=(), max_steps=1, test=False)
    assert train(recipe.replace(dry_run=True)) == {}
    assert train(recipe) == {}  # stopped after a step


def test_a_recipe_takes_a_name_with_a_tag_that_has_no_weights():
    Recipe().replace(model='linformer_vit_pico_patch1_32.untrained').validate()
    with pytest.raises(ValueError, match=r"Unknown model 'linformer_vit_pico_patch1_32.untrain'. Nearest: .*untrained"):
        Recipe().replace(model='linformer_vit_pico_patch1_32.untrain').validate()
