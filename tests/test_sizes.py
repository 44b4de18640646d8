"""Images of any size and checkpoints of any size: on the fly, by timm's three ways to load, and what cannot load."""

import itertools
import json
import logging
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from runs import KINDS_AND_SHARING, slow_but
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from linvision.models.projection_kinds import PROJECTIONS

KINDS = [*PROJECTIONS, 'none']
POSITIONS = ['conv', 'separable', 'learn', 'none']
# every kind once, and every position once: neither asks about the other
KINDS_AND_POSITIONS = slow_but(
    {(kind, 'conv') for kind in KINDS} | {('linear', position) for position in POSITIONS},
    itertools.product(KINDS, POSITIONS),
)


def create(dtype=torch.float64, **kwargs) -> torch.nn.Module:
    model = timm.create_model('test_linformer_vit', **{'num_classes': 5, 'depth': 2, **kwargs}, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


# On the fly


@pytest.mark.parametrize('kind, pos_embed', KINDS_AND_POSITIONS)
@pytest.mark.parametrize('size', [(16, 16), (24, 40), (10, 6), (4, 4)])
def test_dynamic_size_equals_set_input_size(kind, pos_embed, size):
    arguments = dict(projection=kind, pos_embed=pos_embed, class_token=True, patch_size=2, proj_len=6)
    dynamic = create(dynamic_img_size=True, **arguments)
    fixed = create(**arguments)
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size(size)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(dynamic(images), fixed(images))
    ours, theirs = (m.forward_intermediates(images, intermediates_only=True)[-1] for m in (dynamic, fixed))
    assert ours.shape[2:] == (size[0] // 2, size[1] // 2)
    torch.testing.assert_close(ours, theirs)
    dynamic(images).square().sum().backward()
    assert all(p.grad is not None for p in dynamic.parameters())


def test_dynamic_model_refuses_what_the_patches_do_not_divide():
    model = create(dynamic_img_size=True, patch_size=2)
    with pytest.raises(ValueError, match=r'multiples of the patch size \(2, 2\), got \[1, 3, 9, 8\]'):
        model(torch.randn(1, 3, 9, 8, dtype=torch.float64))


@pytest.mark.parametrize('kind, sharing', KINDS_AND_SHARING)
@pytest.mark.parametrize('size', [(24, 40), (6, 10), (32, 4)])
def test_every_projection_takes_every_size(kind, sharing, size):
    arguments = dict(projection=kind, sharing=sharing, in_chans=2, num_classes=4, patch_size=2)
    made = create(img_size=size, **arguments)
    resized = create(img_size=16, **arguments)
    resized.set_input_size(size)
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in resized.state_dict().items()}
    made.load_state_dict(resized.state_dict())
    images = torch.randn(2, 2, *size, dtype=torch.float64)
    torch.testing.assert_close(made(images), resized(images))


@pytest.mark.parametrize('kind', ['conv', 'mean_pool'])
def test_resized_cells_see_enlarged_pixels_as_before(kind):
    model = create(projection=kind, pos_embed='none', local_size=0)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = model(images)
    model.set_input_size((32, 48))
    torch.testing.assert_close(model(images.repeat_interleave(2, 2).repeat_interleave(3, 3)), before)


# Checkpoints


def load(way: str, model: torch.nn.Module, folder: Path, **kwargs) -> torch.nn.Module:
    """The checkpoint of `model` in a model with other arguments, by one of timm's ways."""
    save_for_hf(model, str(folder), safe_serialization=True)
    arguments = {**json.loads((folder / 'config.json').read_text())['model_args'], **kwargs}
    if way == 'local-dir':
        return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()
    file = str(folder / 'model.safetensors')
    if way == 'file':
        overlay = dict(file=file, num_classes=5)
        return timm.create_model(
            'test_linformer_vit', pretrained=True, pretrained_cfg_overlay=overlay, **arguments
        ).eval()
    return timm.create_model('test_linformer_vit', checkpoint_path=file, **arguments).eval()


@pytest.mark.parametrize('way', ['local-dir', 'file', 'checkpoint_path'])
@pytest.mark.parametrize('kind, pos_embed', KINDS_AND_POSITIONS)
def test_checkpoint_of_another_size_loads_as_set_input_size_would(kind, pos_embed, way, tmp_path):
    arguments = dict(projection=kind, pos_embed=pos_embed, sharing='key_value', patch_size=2, class_token=True)
    model = create(dtype=torch.float32, **arguments, proj_len=4)
    loaded = load(way, model, tmp_path, img_size=(24, 32), patch_size=4)
    model.set_input_size((24, 32), (4, 4))
    images = torch.randn(2, 3, 24, 32)
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('way', ['local-dir', 'file', 'checkpoint_path'])
@pytest.mark.parametrize('kind', ['linear', 'separable', 'conv'])
def test_checkpoint_of_another_k_loads(kind, way, tmp_path):
    model = create(dtype=torch.float32, projection=kind, proj_len=16)
    loaded = load(way, model, tmp_path, proj_len=64)
    (E, *_), (old, *_) = loaded.projection.weights, model.projection.weights
    if kind == 'linear':
        assert torch.equal(E, old.repeat_interleave(4, 0))  # each row again, for the cells that it is cut into
    elif kind == 'separable':
        assert torch.equal(E, old.repeat_interleave(2, 0))
    else:
        torch.testing.assert_close(E, F_area(old))
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith('projection.')}
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in rest.items())


def F_area(kernel: torch.Tensor) -> torch.Tensor:
    """A 4 × 4 kernel as a 2 × 2 one of the same sum."""
    return kernel.unflatten(-1, (2, 2)).sum(-1).unflatten(-2, (2, 2)).sum(-2)


def test_weights_of_a_plain_vit_load_and_say_that_the_projection_is_new(tmp_path, caplog):
    plain = VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    safetensors.torch.save_file(plain.state_dict(), tmp_path / 'vit.safetensors')
    arguments = dict(depth=2, num_classes=5, patch_size=4, class_token=True, global_pool='token', pos_embed='learn')
    overlay = dict(file=str(tmp_path / 'vit.safetensors'), num_classes=5)
    for size in (32, 64):
        caplog.clear()
        model = timm.create_model(
            'test_linformer_vit', img_size=size, local_size=0, mlp_ratio=4, proj_len=9, **arguments,
            pretrained=True, pretrained_cfg_overlay=overlay,
        )  # fmt: skip
        assert 'no projection: it stays as initialised' in caplog.text
        state = model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in plain.state_dict().items() if k != 'pos_embed' or size == 32)
        E = state['projection.weights.0']
        assert E.std().item() * E.shape[1] ** 0.5 == pytest.approx(1, rel=0.3)  # as initialised, not empty
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*projection.weights.0'):  # not by the plain way
        model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize('way', ['local-dir', 'file', 'checkpoint_path'])
@pytest.mark.parametrize(
    'kwargs',
    [dict(projection='linear'), dict(projection='conv'), dict(sharing='headwise'), dict(projection='mean_pool')],
)
def test_another_projection_is_refused_with_both_named(kwargs, way, tmp_path):
    model = create(dtype=torch.float32)
    with pytest.raises(ValueError, match='another kind or sharing: it holds 2 matrices.*Create the model with the'):
        load(way, model, tmp_path, **kwargs)


def test_state_of_the_same_size_is_taken_as_it_is(caplog):
    model = create()
    with caplog.at_level(logging.INFO, logger='linvision'):
        create().load_state_dict(model.state_dict())
    assert 'Resized' not in caplog.text
    with caplog.at_level(logging.INFO, logger='linvision'):
        create(img_size=32).load_state_dict(model.state_dict())
    assert 'Resized from the checkpoint to (32, 32) images: projection.weights.0, projection.weights.1' in caplog.text
