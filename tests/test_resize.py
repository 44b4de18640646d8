"""Projections and models between grids: areas against cells cut to a common size, functions against scaled images."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch.utils._python_dispatch import TorchDispatchMode

from linvision.models.local_conv import spacing
from linvision.models.projection import SHARING, Projection
from linvision.models.resize import area_matrix, checkpoint_filter_fn, resize_axis, resize_rows

SIZES = [(4, 8), (8, 4), (4, 6), (6, 4), (5, 7), (7, 5), (3, 3), (1, 5), (5, 1)]
LIKE = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize('old, new', SIZES)
def test_area_matrix_equals_cells_cut_to_a_common_size(old, new):
    common = math.lcm(old, new)
    values = torch.randn(old, dtype=torch.float64)
    pieces = values.repeat_interleave(common // old) / (common // old)  # each old cell, cut into equal pieces
    torch.testing.assert_close(area_matrix(old, new, LIKE) @ values, pieces.unflatten(0, (new, -1)).sum(1))


@pytest.mark.parametrize('factor', [2, 3])
def test_area_matrix_equals_torch_area_interpolation(factor):
    values = torch.randn(12, dtype=torch.float64)
    mean = F.interpolate(values[None, None], scale_factor=1 / factor, mode='area', recompute_scale_factor=True)
    torch.testing.assert_close(area_matrix(12, 12 // factor, LIKE) @ values, factor * mean[0, 0])


@pytest.mark.parametrize('old, new', SIZES)
def test_new_rows_are_means_of_the_old_rows_they_cover(old, new):
    common = math.lcm(old, new)
    E = torch.randn(old, 5, dtype=torch.float64)
    mean = E.repeat_interleave(common // old, dim=0).unflatten(0, (new, -1)).mean(1)
    torch.testing.assert_close(resize_rows(E, new), mean)


class Dtypes(TorchDispatchMode):
    """Notes the dtype of whatever is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.add(out.dtype)
        return out


@pytest.mark.parametrize('kwargs', [dict(projection='linear', pos_embed='separable'), dict(projection='conv')])
def test_resizing_needs_no_double_precision(kwargs):
    model = timm.create_model('test_linformer_vit', dynamic_img_size=True, **kwargs)
    with Dtypes() as dtypes:
        model(torch.randn(1, 3, 24, 12)).sum().backward()
        model.set_input_size((20, 12))
        model.projection.pool()
    assert torch.float32 in dtypes.seen and torch.float64 not in dtypes.seen  # which Apple's GPUs lack


def build(kind: str, sharing: str, grid: tuple[int, int]) -> Projection:
    return Projection(kind, sharing, [(2, 3)] * 2, grid, 2, 4, dtype=torch.float64)


def as_maps(projection: Projection, kind: str) -> torch.Tensor:
    """All matrices of a projection on the token grid, (..., K, h, w)."""
    if kind == 'linear':
        return torch.stack(list(projection.weights))
    pairs = zip(projection.weights[::2], projection.weights[1::2], strict=True)
    return torch.stack([torch.einsum('...ah,...bw->...abhw', *pair).flatten(-4, -3) for pair in pairs])


@pytest.mark.parametrize('new_grid', [(8, 12), (12, 6), (3, 9), (5, 7), (2, 3)])
@pytest.mark.parametrize('sharing', SHARING)
@pytest.mark.parametrize('kind', ['linear', 'separable'])
def test_set_grid_resizes_both_axes_by_area_and_keeps_row_sums(kind, sharing, new_grid):
    grid = (4, 6)
    projection = build(kind, sharing, grid)
    old, sums = as_maps(projection, kind).detach(), [layer[-1] for layer in projection(LIKE, grid)]
    projection.set_grid(new_grid)
    cut = [math.lcm(a, b) for a, b in zip(grid, new_grid, strict=True)]
    pieces = old.repeat_interleave(cut[0] // grid[0], -2).repeat_interleave(cut[1] // grid[1], -1)
    pieces = pieces / (pieces.shape[-2] * pieces.shape[-1]) * (grid[0] * grid[1])
    blocks = pieces.unflatten(-1, (new_grid[1], -1)).sum(-1).unflatten(-2, (new_grid[0], -1)).sum(-2)
    torch.testing.assert_close(as_maps(projection, kind), blocks)
    for before, layer in zip(sums, projection(LIKE, new_grid), strict=True):
        torch.testing.assert_close(layer[-1], before)
    assert min(abs(s).max().item() for s in sums) > 0.1  # there was something to keep


@pytest.mark.parametrize('new_grid', [(8, 12), (4, 18), (16, 6)])
@pytest.mark.parametrize('kind', ['linear', 'separable'])
def test_there_and_back_by_integer_factors_is_exact(kind, new_grid):
    projection = build(kind, 'headwise', (4, 6))
    before = [w.detach().clone() for w in projection.weights]
    projection.set_grid(new_grid)
    projection.set_grid((4, 6))
    for weight, old in zip(projection.weights, before, strict=True):
        torch.testing.assert_close(weight.detach(), old, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize('new_grid', [(40, 40), (20, 28), (24, 36)])
@pytest.mark.parametrize('kind', ['linear', 'separable', 'conv'])
def test_there_and_back_hardly_changes_what_smooth_inputs_become(kind, new_grid):
    grid = (32, 32)
    projection = Projection(kind, 'layerwise', [(4, 4)], grid, 1, 3, dtype=torch.float64)
    x = smooth_images(grid).flatten(2).transpose(1, 2)  # (B, N, 3)

    def rows() -> torch.Tensor:
        return projection.kind.reduce(x, projection(x, grid)[0][:-1], grid, projection.row_grids[0])

    before = rows()
    projection.set_grid(new_grid)
    projection.set_grid(grid)
    assert (rows() - before).norm() < 0.05 * before.norm()


def test_frozen_matrices_stay_frozen():
    projection = build('separable', 'layerwise', (4, 6)).requires_grad_(False)
    projection.set_grid((8, 12))
    assert not any(weight.requires_grad for weight in projection.weights)


def test_axis_tables_are_interpolated_as_the_image_that_they_make():
    row, column = torch.randn(1, 4, 3), torch.randn(1, 6, 3)
    image = (row.unsqueeze(2) + column.unsqueeze(1)).permute(0, 3, 1, 2)  # (1, D, h, w)
    resized = resize_axis(row, 9).unsqueeze(2) + resize_axis(column, 7).unsqueeze(1)
    expected = F.interpolate(image, size=(9, 7), mode='bilinear', align_corners=False)
    torch.testing.assert_close(resized.permute(0, 3, 1, 2), expected)


def smooth_images(size: tuple[int, int], n: int = 8) -> torch.Tensor:
    """The same n images at any size: sums of slow waves, sampled at the centres of the pixels."""
    torch.manual_seed(1)
    waves, phase = torch.randn(n, 3, 4, dtype=torch.float64), 6.3 * torch.rand(n, 3, 4, dtype=torch.float64)
    y = ((torch.arange(size[0], dtype=torch.float64) + 0.5) / size[0]).view(-1, 1, 1)
    x = ((torch.arange(size[1], dtype=torch.float64) + 0.5) / size[1]).view(1, -1, 1)
    angle = 3 * torch.stack([y + 0 * x, x + 0 * y, x + y, x - y], dim=-1).squeeze(2)  # (h, w, 4)
    return (waves[:, :, None, None] * torch.sin(angle + phase[:, :, None, None])).sum(-1)


def create(**kwargs):
    model = timm.create_model('test_linformer_vit', num_classes=7, dtype=torch.float64, **kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'attn' in name or 'head' in name:  # sharper attention than a fresh model's, and logits to compare
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize('new_size', [(24, 16), (12, 32), (36, 8)])
@pytest.mark.parametrize('sharing', SHARING)
@pytest.mark.parametrize('kind', ['linear', 'separable'])
def test_model_of_another_size_is_the_same_function_of_enlarged_pixels(kind, sharing, new_size):
    model = create(img_size=(12, 8), proj_len=6, projection=kind, sharing=sharing, pos_embed='none', local_size=0)
    images = torch.randn(4, 3, 12, 8, dtype=torch.float64)
    before = model(images)
    model.set_input_size(new_size)
    enlarged = images.repeat_interleave(new_size[0] // 12, 2).repeat_interleave(new_size[1] // 8, 3)
    torch.testing.assert_close(model(enlarged), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('factor', [(2, 2), (3, 1)])
@pytest.mark.parametrize('pos_embed', ['conv', 'none'])
def test_local_kernels_see_enlarged_images_as_before(pos_embed, factor):
    model = create(img_size=(12, 16), local_grid=(12, 16), proj_len=4, pos_embed=pos_embed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'local' in name:
                parameter.normal_()
    images = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    before = model(images)
    model.set_input_size((12 * factor[0], 16 * factor[1]))
    enlarged = images.repeat_interleave(factor[0], 2).repeat_interleave(factor[1], 3)
    torch.testing.assert_close(model(enlarged), before)
    plain = create(img_size=(12 * factor[0], 16 * factor[1]), local_grid=0, proj_len=4, pos_embed=pos_embed)
    plain.load_state_dict(model.state_dict())  # undilated
    assert (plain(enlarged) - before).abs().max() > 0.01


@pytest.mark.parametrize(
    'tokens, own, taps', [(32, 32, 1), (16, 32, 1), (47, 32, 1), (48, 32, 2), (64, 32, 2), (96, 32, 3)]
)
def test_taps_of_a_local_kernel_lie_as_far_apart_as_the_grid_is_finer(tokens, own, taps):
    assert spacing(tokens, own) == taps
    assert spacing(tokens, 0) == 1


@pytest.mark.parametrize('pos_embed', ['none', 'separable', 'learn'])
@pytest.mark.parametrize('kind', ['linear', 'separable'])
@pytest.mark.parametrize('new_size', [(32, 32), (24, 40), (20, 16)])
@pytest.mark.parametrize('row_norm, limit', [(False, 0.1), (True, 0.25)])  # a norm makes more of small differences
def test_function_hardly_changes_on_smooth_images(kind, pos_embed, new_size, row_norm, limit):
    model = create(projection=kind, pos_embed=pos_embed, local_size=0, row_norm=row_norm)
    before = model(smooth_images((16, 16)))
    model.set_input_size(new_size)
    after = model(smooth_images(new_size))
    spread = (before - before.mean(0)).abs().mean()  # what images make of a difference
    # fresh positions are noise, which interpolation smooths
    assert (after - before).abs().mean() < limit * spread
    assert spread > 0.05


@pytest.mark.parametrize(
    'kwargs', [dict(projection='linear', proj_len=6), dict(sharing='none', proj_len=12), dict(pos_embed='learn')]
)
@pytest.mark.parametrize('new_size', [(24, 32), (12, 20)])
def test_resized_model_loads_into_a_model_made_at_that_size(kwargs, new_size):
    kwargs = {'proj_len': 12, **kwargs}
    model = create(img_size=(12, 16), **kwargs)
    model.set_input_size(new_size)
    made = create(img_size=new_size, **kwargs)
    made.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, *new_size, dtype=torch.float64)
    assert torch.equal(made(images), model(images))


def test_model_resized_to_another_shape_loads_into_a_model_made_at_that_shape():
    model = create(img_size=16, proj_len=16)
    model.set_input_size((8, 32))
    made = create(img_size=(8, 32), proj_len=16)
    made.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 8, 32, dtype=torch.float64)
    assert torch.equal(made(images), model(images))


@pytest.mark.parametrize(
    'tokens', [dict(), dict(class_token=True, reg_tokens=1), dict(class_token=True, no_embed_class=True)]
)
@pytest.mark.parametrize('new_size', [(8, 8), (16, 4), (8, 32), (6, 10)])
@pytest.mark.parametrize('kind', ['linear', 'separable'])
def test_learned_positions_of_images_that_are_not_square_are_resized_on_their_own_grid(kind, new_size, tokens):
    arguments = dict(pos_embed='learn', projection=kind, proj_len=4, **tokens)
    model, made = create(img_size=(4, 16), **arguments), create(img_size=new_size, **arguments)
    made.load_state_dict(model.state_dict())
    model.set_input_size(new_size)
    images = torch.randn(2, 3, *new_size, dtype=torch.float64)
    assert torch.equal(made.pos_embed, model.pos_embed) and torch.equal(made(images), model(images))


@pytest.mark.parametrize('kind', ['linear', 'separable', 'conv', 'mean_pool', 'none'])
@pytest.mark.parametrize('new_size', [(8, 8), (8, 16), (4, 32)])
def test_saved_models_that_are_not_square_load_at_another_size(kind, new_size, tmp_path):
    model = create(img_size=(4, 16), pos_embed='learn', projection=kind, proj_len=4).float()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=new_size).eval()
    model.set_input_size(new_size)
    images = torch.randn(2, 3, *new_size)
    assert torch.equal(loaded.pos_embed, model.pos_embed) and torch.equal(loaded(images), model(images))


@pytest.mark.parametrize('tokens', [{}, {'class_token': True, 'no_embed_class': True}, {'class_token': True}])
def test_positions_of_another_grid_of_as_many_tokens_are_resized(tokens):
    P = 1 if tokens and 'no_embed_class' not in tokens else 0
    model = create(img_size=(4, 16), pos_embed='learn', proj_len=4, **tokens).float()
    image = model.pos_embed[:, P:].unflatten(1, (4, 16)).permute(0, 3, 1, 2)
    expected = F.interpolate(image, (8, 8), mode='bicubic', antialias=True).flatten(2).transpose(1, 2)
    loaded = create(img_size=8, pos_embed='learn', proj_len=4, **tokens).float()
    loaded.load_state_dict(model.state_dict())
    changed = copy.deepcopy(model)
    changed.set_input_size(img_size=8)
    for other in (loaded, changed):
        torch.testing.assert_close(other.pos_embed[:, P:], expected)
        assert torch.equal(other.pos_embed[:, :P], model.pos_embed[:, :P])


def test_a_grid_that_a_checkpoint_does_not_tell_is_a_square_or_refused():
    arguments = dict(pos_embed='learn', projection='mean_pool', proj_len=4)
    square, made = create(img_size=8, **arguments), create(img_size=(4, 32), **arguments)
    made.load_state_dict(square.state_dict())
    square.set_input_size((4, 32))
    assert torch.equal(made.pos_embed, square.pos_embed)
    with pytest.raises(ValueError, match=r'128 positions, which are no square.*the model has \(8, 8\)'):
        create(img_size=8, **arguments).load_state_dict(made.state_dict())


@pytest.mark.parametrize('kind, other', [('linear', 'separable'), ('separable', 'linear'), ('conv', 'separable')])
def test_a_checkpoint_of_another_kind_is_refused_as_such_whoever_loads_it(kind, other):
    saved = create(img_size=8, pos_embed='learn', projection=kind, proj_len=4).state_dict()
    model = create(img_size=8, pos_embed='learn', projection=other, proj_len=4)
    for load in (model.load_state_dict, lambda state: model.load_state_dict(checkpoint_filter_fn(state, model))):
        with pytest.raises(ValueError, match='projection is of another kind or sharing'):
            load(dict(saved))


def test_set_input_size_takes_another_patch_size():
    model = create(img_size=16, patch_size=2, proj_len=4)
    model.set_input_size(img_size=(16, 16), patch_size=(4, 4))
    assert model.projection.grid == model.patch_embed.grid_size == (4, 4)
    made = create(img_size=16, patch_size=4, proj_len=4)
    made.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(made(images), model(images))


@pytest.mark.parametrize('kwargs', [dict(img_size=(18, 16)), dict(img_size=(16, 1)), dict(patch_size=(5, 5))])
def test_sizes_that_do_not_divide_are_refused_and_change_nothing(kwargs):
    model = create(img_size=16, patch_size=4, proj_len=4)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = model(images)
    with pytest.raises(ValueError, match='multiple of the patch size'):
        model.set_input_size(**kwargs)
    assert torch.equal(model(images), before)
