"""Masked pixels: what is hidden, what the loss is, that nothing hidden is read, and that the backbone starts others."""

import dataclasses
import json

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from runs import CPU, assert_stops_change_nothing, events, small, weights

from linvision.data import ImageSet, create_batches, create_dataset, datasets
from linvision.train import pictures, train
from linvision.train.learner import Learner
from linvision.train.masked_pixels import (
    MaskedPixelsTask,
    adapt,
    evaluate_masked,
    hidden_tokens,
    mask_for,
    patches,
    reconstruction_loss,
)
from linvision.train.model import resolved
from linvision.train.parallel import Processes


def masked_model(**arguments):
    model = timm.create_model('test_linformer_vit', **{'in_chans': 3, **arguments})
    adapt(model)
    return model.eval()


@pytest.fixture
def recipe(small_recipe):
    return small_recipe.replace(task='masked_pixels', epochs=1, lr=3e-3, mask_size=2)


# ------------------------------------------------------------------------------------------------------- what is hidden


@pytest.mark.parametrize('patch', [(1, 1), (2, 2), (4, 2)])
def test_patches_are_those_of_unfold(patch):
    images = torch.randn(2, 3, 8, 12)
    blocks = F.unfold(images, patch, stride=patch)  # (B, C·p·q, N)
    expected = blocks.unflatten(1, (3, patch[0] * patch[1])).permute(0, 3, 2, 1).flatten(2)  # (B, N, p·q·C)
    assert torch.equal(patches(images, patch), expected)


@pytest.mark.parametrize('ratio, cells', [(0.5, 8), (0.75, 12), (0.01, 1), (0.99, 15)])
def test_whole_cells_are_hidden_as_many_in_each_image(ratio, cells):
    mask = hidden_tokens(torch.rand(400, 144), (12, 12), ratio, cell=3)
    blocks = mask.view(400, 4, 3, 4, 3).transpose(2, 3).reshape(400, 16, 9)
    hidden = blocks.any(-1)
    assert torch.equal(hidden, blocks.all(-1)) and (hidden.sum(1) == cells).all()
    share, chance = hidden.float().mean(0), cells / 16
    assert (share - chance).abs().max() < 4.5 * (chance * (1 - chance) / 400) ** 0.5  # every cell alike
    assert len(hidden.unique(dim=0)) >= min(16, 400 // 2)


def test_cells_at_the_border_may_be_smaller_but_one_cell_is_refused():
    mask = hidden_tokens(torch.rand(50, 25), (5, 5), 0.5, cell=2).view(50, 5, 5)
    assert torch.equal(mask[:, 0], mask[:, 1]) and torch.equal(mask[:, :, 2], mask[:, :, 3])
    assert (mask[:, 4] != mask[:, 3]).any()
    with pytest.raises(ValueError, match='mask_size leaves one cell on a grid of 4×4 tokens'):
        hidden_tokens(torch.rand(1, 16), (4, 4), 0.5, cell=4)


def test_a_mask_of_pixels_is_one_of_tokens_and_belongs_to_its_image():
    model = masked_model(patch_size=2)
    images = torch.randn(3, 3, 16, 16)
    mask = mask_for(model, images, 0.5, 4, torch.tensor([7, 8, 9]))  # cells of 2×2 tokens, 4×4 pixels
    assert mask.shape == (3, 64) and (mask.sum(1) == 32).all()
    blocks = mask.view(3, 4, 2, 4, 2)
    assert torch.equal(blocks.any(4).any(2), blocks.all(4).all(2))
    assert torch.equal(mask_for(model, images[:2], 0.5, 4, torch.tensor([9, 7])), mask[[2, 0]])
    assert torch.equal(
        mask_for(model, images, 0.5, 1, torch.zeros(3, dtype=torch.int64)).sum(1), torch.tensor([32] * 3)
    )  # at least a token
    assert not torch.equal(*(mask_for(model, images, 0.5, 4) for _ in range(2)))


@pytest.mark.parametrize(
    'arguments',
    [
        {},
        {'projection': 'linear', 'pos_embed': 'separable', 'local_size': 0, 'row_norm': False},
        {'projection': 'conv', 'pos_embed': 'learn', 'class_token': True},
        {'projection': 'mean_pool', 'chunk_size': 64},
        {'projection': 'max_pool', 'sharing': 'key_value', 'local_size': 0},
        {'projection': 'none', 'patch_size': 2},
    ],
    ids=str,
)
def test_hidden_pixels_reach_no_output_at_all(arguments):
    model = masked_model(**arguments)
    images = torch.randn(2, 3, 16, 16)
    mask = mask_for(model, images, 0.5, 4)
    side = model.patch_embed.patch_size[0]
    pixels = mask.view(2, 1, 16 // side, 16 // side).repeat_interleave(side, 2).repeat_interleave(side, 3)
    pixels = pixels.expand(-1, 3, -1, -1)
    others = torch.where(pixels, 100 * torch.randn_like(images), images)
    output = model(images, key_padding_mask=mask)
    assert output.shape == (2, mask.shape[1] + model.num_prefix_tokens, side * side * 3)
    assert torch.equal(model(others, key_padding_mask=mask), output)
    assert not torch.equal(model(torch.where(pixels, images, images + 0.1), key_padding_mask=mask), output)
    images.requires_grad_()
    model.train()(images, key_padding_mask=mask).square().sum().backward()
    assert (images.grad[pixels] == 0).all() and (images.grad[~pixels] != 0).float().mean() > 0.99
    before = model(images, key_padding_mask=mask)[:, model.num_prefix_tokens :][mask]
    assert before.std(0).mean() > 1e-4  # hidden tokens are told apart, by their places


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize('arguments', [{}, {'patch_size': 2, 'class_token': True}], ids=str)
def test_the_loss_is_the_squared_error_of_the_hidden_pixels(arguments):
    model = masked_model(**arguments)
    images, side, P = torch.randn(2, 3, 16, 16), model.patch_embed.patch_size[0], model.num_prefix_tokens
    mask = mask_for(model, images, 0.5, 4)
    output = model(images, key_padding_mask=mask).detach()
    errors = []
    for b, token in mask.nonzero().tolist():
        row, column = divmod(token, 16 // side)
        said = iter(output[b, P + token].double())
        for y in range(row * side, (row + 1) * side):
            for x in range(column * side, (column + 1) * side):
                errors += [(next(said) - images[b, c, y, x].double()).square() for c in range(3)]
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(reconstruction_loss(model, output, images, mask).double(), expected, rtol=1e-6, atol=0)
    task = MaskedPixelsTask(model, 0.5, 4, device=CPU, verbose=False)
    torch.manual_seed(3)
    loss = task(images, torch.tensor([5, -1]))['loss']
    torch.manual_seed(3)
    mask = mask_for(model, images, 0.5, 4)
    expected = reconstruction_loss(model, model(images, key_padding_mask=mask), images, mask)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize('count, batch_size', [(1, 7), (1, 40), (2, 8), (3, 6)])
def test_an_images_score_depends_on_neither_batches_nor_processes(monkeypatch, count, batch_size):
    monkeypatch.setattr(dist, 'all_reduce', lambda tensor: None)
    model = masked_model(in_chans=1)
    images = ImageSet(torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8), torch.arange(40), ('a',), 16)
    whole = evaluate_masked(model, create_batches(images, 100, (0.5,), (0.3,), CPU), 16, 0.5, 2)
    parts = [
        evaluate_masked(model, create_batches(images, batch_size, (0.5,), (0.3,), CPU, rank=r, count=count), 16, 0.5, 2)
        for r in range(count)
    ]
    assert sum(p['num_samples'] for p in parts) == whole['num_samples'] == 40
    assert sum(p['loss'] * p['num_samples'] for p in parts) / 40 == pytest.approx(whole['loss'], rel=1e-6)


def test_a_picture_shows_what_is_seen_and_what_is_told(monkeypatch):
    model = masked_model(patch_size=2)
    images = ImageSet(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), torch.arange(4), ('a',), 16)
    found = create_batches(images, 4, (0.5,) * 3, (0.3,) * 3, CPU)
    monkeypatch.setattr(pictures, 'draw', lambda drawn, columns: drawn)
    drawn = pictures.reconstructions(model, found, 16, ('a',), ratio=0.5, size=4)
    whole, seen, told = (
        torch.stack([image for image, title in drawn if title == t]) for t in ('image', 'seen', 'told')
    )
    assert torch.equal(whole, next(found.ordered(16))[0])
    mask = mask_for(model, whole, 0.5, 4, torch.arange(4))
    hidden = mask.view(4, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3).expand_as(whole)
    assert torch.equal(seen[~hidden], whole[~hidden]) and (seen[hidden] == whole.min()).all()
    output = model(seen, key_padding_mask=mask)
    assert torch.equal(patches(told, (2, 2))[mask], output[mask]) and torch.equal(told[~hidden], whole[~hidden])


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_learns_to_tell_hidden_pixels_and_shows_them(recipe, with_pictures):
    metrics = train(recipe.replace(epochs=8, opt='muon', lr=0.01, stages=(), val_fraction=0.25, eval_every=4))
    assert 0.1 < metrics['loss'] < 0.85 and metrics['val_loss'] < 0.85  # 1 is the variance of the pixels
    assert metrics['num_samples'] == 100 and metrics['num_left_out'] == 0 and 'top1' not in metrics
    assert metrics['best_val_loss'] <= metrics['val_loss'] + 1e-3
    assert json.loads((recipe.run.output_dir / 'metrics.json').read_text()) == metrics
    board = events(recipe.run.output_dir)
    assert {'test/reconstructions', 'val/reconstructions', 'train/batch'} <= set(board.Tags()['images'])
    assert not {'test/misclassified', 'test/attention'} & set(board.Tags()['images'])
    points = [p.value for p in board.Scalars('val/loss')]
    assert points[-1] < points[0] and metrics['best_val_loss'] == pytest.approx(min(points[:-1]))


def test_the_best_is_one_of_the_last_image_size(recipe):
    metrics = train(recipe.replace(epochs=2, val_fraction=0.25, eval_every=0.5, test=False))
    points = events(recipe.run.output_dir).Scalars('val/loss')
    last = {p.step: p.value for p in points[:-1] if p.step > metrics['steps'] / 2}  # at 16×16 pixels
    assert metrics['best_step'] == min(last, key=last.get)
    assert metrics['best_val_loss'] == pytest.approx(min(last.values()))
    assert metrics['best_val_loss'] > min(p.value for p in points)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_weights_to_the_bit(recipe, tmp_path):
    assert_stops_change_nothing(recipe.replace(epochs=2), tmp_path / 'parts', 3, 10)


def test_labels_change_nothing(recipe, tmp_path, monkeypatch):
    def permuted(root, split, download):
        images = create_dataset('fake', root, split)
        return dataclasses.replace(images, labels=images.labels.flip(0))

    monkeypatch.setitem(datasets.DATASETS, 'permuted', permuted)
    one = train(recipe.replace(hflip=0.5))
    other = recipe.replace(hflip=0.5, dataset='permuted', output_dir=tmp_path / 'permuted')
    assert train(other)['loss'] == one['loss']
    first, second = weights(recipe.run.output_dir), weights(other.run.output_dir)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A short masked run with a class token and separable positions, on grey 16×16 images."""
    folder = tmp_path_factory.mktemp('masked') / 'run'
    arguments = {'class_token': True, 'pos_embed': 'separable'}
    train(small(folder, task='masked_pixels', epochs=0.5, lr=3e-3, mask_size=2, model_args=arguments, test=False))
    return folder, arguments


def learner(recipe, size):
    return Learner(recipe, {'in_chans': 1, 'num_classes': 10}, size, size, 10, (0.5,), (0.5,), Processes(CPU)).model


@pytest.mark.parametrize('size', [16, 12, 24])
def test_its_backbone_starts_a_classifier_of_any_size(pretrained, size):
    folder, arguments = pretrained
    recipe = resolved(small(folder, init=str(folder / 'model'), model_args=arguments))
    model = learner(recipe, size)
    # timm's own way to load a checkpoint at another size
    expected = timm.create_model(f'local-dir:{folder}/model', pretrained=True, img_size=size, num_classes=10)
    found, wanted = model.state_dict(), expected.state_dict()
    for name in wanted.keys() - {'head.weight', 'head.bias'}:
        assert torch.equal(found[name], wanted[name]), name
    fresh = learner(recipe.replace(init=''), size).state_dict()
    assert not torch.equal(found['blocks.0.attn.qkv.weight'], fresh['blocks.0.attn.qkv.weight'])
    images = torch.randn(2, 1, size, size)
    features = [m.eval().forward_head(m.forward_features(images), pre_logits=True) for m in (model, expected)]
    torch.testing.assert_close(*features)


def test_the_exported_backbone_pools_as_registered_and_has_no_head(pretrained):
    model = timm.create_model(f'local-dir:{pretrained[0]}/model', pretrained=True).eval()
    assert model.num_classes == 0 and model.global_pool == 'avg'
    images = torch.randn(2, 1, 16, 16)
    mean = model.forward_features(images)[:, 1:].mean(1)  # without the class token
    torch.testing.assert_close(model(images), model.fc_norm(mean))


def test_a_run_that_starts_from_a_backbone_is_another_run_and_trains(pretrained, tmp_path):
    folder, arguments = pretrained
    recipe = small(tmp_path / 'run', model_args=arguments, epochs=0.5, init=str(folder))
    assert train(recipe)['num_samples'] == 100
    with pytest.raises(ValueError, match='init: .* there,  now'):
        train(recipe.replace(init=''))


@pytest.mark.parametrize(
    'change, message',
    [
        ({'embed_dim': 48}, "'embed_dim': 32.*'embed_dim': 48"),
        ({'class_token': False}, "'has_class_token': True.*'has_class_token': False"),
        ({'depth': 4}, r'lacks .*blocks.3'),
        ({'depth': 2}, r'has .*blocks.2.* besides'),
        ({'projection': 'linear'}, 'linear'),
        ({'pos_embed': 'learn'}, 'lacks .*pos_embed'),
        ({'token_norm': True, 'class_token': False}, "'token_norm': False.*'token_norm': True"),
    ],
    ids=str,
)
def test_a_backbone_that_does_not_fit_is_refused(pretrained, change, message):
    folder, arguments = pretrained
    with pytest.raises(ValueError, match=rf'The weights of {folder}/model do not fit.*{message}'):
        learner(small(folder, init=str(folder / 'model'), model_args={**arguments, **change}), 16)


def test_a_backbone_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="No weights to start from in 'no_such_model'"):
        learner(small(tmp_path, init='no_such_model'), 16)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'model': 'test_vit', 'stages': ((160, 1.0),)}, 'only linformer_vit_.* models can; got VisionTransformer'),
        ({'mask_size': 16}, 'mask_size leaves one cell on a grid of 8×8 tokens'),
        ({'mask_ratio': 1.0}, 'mask_ratio must lie between 0 and 1, got 1.0'),
        ({'mixup': 0.2}, 'masked_pixels looks at no labels'),
        ({'teacher': 'anything'}, 'masked_pixels looks at no labels'),
    ],
    ids=str,
)
def test_what_cannot_be_hidden_is_refused(recipe, change, message):
    with pytest.raises(ValueError, match=message):
        train(recipe.replace(**change))
