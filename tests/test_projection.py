"""The K×N maps: their layout, scale and row sums against matrices written out, and what is refused."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from linvision.models.projection import SHARING, Projection, projected_rows, row_grid
from linvision.models.projection_kinds import PROJECTIONS

GRID = (4, 6)  # not square, so that a swapped axis shows
DEPTH, HEADS, DIM = 3, 2, 8
LENGTHS = [6, 8, 4]  # one K a layer
LEARNED = ['linear', 'separable', 'conv', 'dynamic']
EXACT = dict(rtol=1e-12, atol=1e-12)


def build(kind: str, sharing: str, **kwargs) -> Projection:
    """A float64 projection; one K for all layers where they share one matrix, else one a layer."""
    proj_len = 6 if sharing == 'layerwise' else LENGTHS
    rows = projected_rows(kind, sharing, proj_len, DEPTH)
    return Projection(kind, sharing, rows, GRID, HEADS, DIM, dtype=torch.float64, **kwargs)


def reference(kind: str, weights: list[torch.Tensor], x: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor:
    """E x of one matrix and one head, (B, N, D) -> (B, K, D), by Kronecker products and PyTorch's own layers."""
    image = x.transpose(1, 2).unflatten(2, GRID)  # (B, D, h, w)
    cell = (math.ceil(GRID[0] / rows[0]), math.ceil(GRID[1] / rows[1]))
    padding = (0, -GRID[1] % cell[1], 0, -GRID[0] % cell[0])
    if kind == 'linear':
        return torch.einsum('khw,bdhw->bkd', weights[0], image)
    if kind == 'separable':
        return torch.kron(*weights) @ x
    if kind == 'dynamic':
        place = [(torch.arange(n, dtype=x.dtype) + 0.5) / n for n in GRID]
        prior = []
        for axis, (p, n) in enumerate(zip(place, rows, strict=True)):
            middle = ((torch.arange(n, dtype=x.dtype) + 0.5) / n).unsqueeze(1 - axis)
            centre, sigma = middle + weights[1][axis] / n, weights[1][2 + axis].exp() / n / math.sqrt(12)
            prior.append(((p.view(-1, 1, 1) - centre) / sigma).square() / -2)  # (h or w, K_h, K_w)
        scores = prior[0].unsqueeze(1) + prior[1].unsqueeze(0) + torch.einsum('dkl,bdhw->bhwkl', weights[0], image)
        return scores.flatten(1, 2).flatten(2).softmax(1).mT @ x
    if kind == 'conv':
        out = F.conv2d(F.pad(image, padding), weights[0], stride=cell, groups=image.shape[1])
    elif kind == 'mean_pool':
        out = F.avg_pool2d(image, cell, ceil_mode=True)  # does not count what is outside
    else:
        out = F.max_pool2d(image, cell, ceil_mode=True)
    return out.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    'sharing, shapes',  # the paper's section 4: one matrix; one a layer; E and F a layer; these for each head
    [
        ('layerwise', [(6, *GRID)]),
        ('key_value', [(k, *GRID) for k in LENGTHS]),
        ('headwise', [(k, *GRID) for k in LENGTHS for _ in 'EF']),
        ('none', [(HEADS, k, *GRID) for k in LENGTHS for _ in 'EF']),
    ],
)
def test_sharing_has_the_matrices_of_the_paper(sharing, shapes):
    assert [tuple(weight.shape) for weight in build('linear', sharing).weights] == shapes


@pytest.mark.parametrize('sharing', SHARING)
@pytest.mark.parametrize('kind', PROJECTIONS)
def test_every_layer_gets_its_own_matrices_and_their_row_sums(kind, sharing):
    projection = build(kind, sharing)
    x = torch.randn(2, HEADS, GRID[0] * GRID[1], DIM // HEADS, dtype=torch.float64)
    if sharing != 'none':
        x = x.transpose(1, 2).flatten(2)  # (B, N, D)
    tensors = projection(x, GRID)
    assert len(tensors) == DEPTH
    n = {'linear': 1, 'separable': 2, 'conv': 1, 'dynamic': 2}.get(kind, 0)  # parameters of a matrix
    for layer in range(DEPTH):
        first = 0 if sharing == 'layerwise' else layer
        rows = projection.row_grids[first]
        m = len(tensors[layer]) // SHARING[sharing]
        for i in range(SHARING[sharing]):
            *factors, sums = tensors[layer][i * m : (i + 1) * m]
            start = (first * SHARING[sharing] + i) * n
            weights = list(projection.weights[start : start + n])
            reduced = projection.kind.reduce(x, factors, GRID, rows)
            ones = torch.ones(1, GRID[0] * GRID[1], 1, dtype=torch.float64)
            for h in range(HEADS if sharing == 'none' else 1):
                own, xs, out, s = weights, x, reduced, sums
                if sharing == 'none':
                    own, xs, out = [w[h] for w in weights], x[:, h], reduced[:, h]
                    s = sums[h] if kind in ('linear', 'separable') else sums
                torch.testing.assert_close(out, reference(kind, own, xs, rows), **EXACT)
                # the biases of what is no fixed matrix over tokens are added whole
                whole = kind in ('conv', 'dynamic')
                total = torch.ones_like(s) if whole else reference(kind, own, ones, rows)[0, :, 0]
                torch.testing.assert_close(s, total, **EXACT)


@pytest.mark.parametrize('sharing, matrices', [('none', 288), ('headwise', 24), ('key_value', 12), ('layerwise', 1)])
def test_number_of_matrices_of_twelve_layers_and_heads_is_the_papers(sharing, matrices):
    model = timm.create_model(
        'test_linformer_vit', depth=12, num_heads=12, embed_dim=24, projection='linear', sharing=sharing, proj_len=5
    )
    assert sum(w.numel() for w in model.projection.weights) == matrices * 5 * 256


@pytest.mark.parametrize('sharing', SHARING)
def test_number_of_parameters_follows_the_closed_formula(sharing):
    N = GRID[0] * GRID[1]
    lengths = [6] if sharing == 'layerwise' else LENGTHS
    copies = {'layerwise': 1, 'key_value': 1, 'headwise': 2, 'none': 2 * HEADS}[sharing]
    linear = sum(p.numel() for p in build('linear', sharing).parameters())
    assert linear == copies * sum(K * N for K in lengths)
    separable = sum(p.numel() for p in build('separable', sharing).parameters())
    row_grids = {4: (2, 2), 6: (2, 3), 8: (2, 4)}
    assert separable == copies * sum(row_grids[K][0] * GRID[0] + row_grids[K][1] * GRID[1] for K in lengths)
    conv = sum(p.numel() for p in build('conv', sharing).parameters())
    cells = {4: 2 * 3, 6: 2 * 2, 8: 2 * 2}  # 4 × 6 tokens by 2 × 2, 2 × 3 and 2 × 4 rows, rounded up
    width = DIM // HEADS if sharing == 'none' else DIM
    assert conv == copies * sum(width * cells[K] for K in lengths)
    dynamic = sum(p.numel() for p in build('dynamic', sharing).parameters())
    assert dynamic == copies * sum((width + 4) * K for K in lengths)
    assert not list(build('mean_pool', sharing).parameters()) + list(build('max_pool', sharing).parameters())


@pytest.mark.parametrize('kind', PROJECTIONS)
@pytest.mark.parametrize('grid, rows', [((8, 8), (4, 4)), ((4, 8), (4, 4)), ((7, 5), (3, 2)), ((9, 9), (8, 8))])
def test_reduction_is_the_same_for_any_leading_axes(kind, grid, rows):
    kind, N = PROJECTIONS[kind], grid[0] * grid[1]
    x = torch.randn(2, 3, N, 4, dtype=torch.float64)
    factors = kind.factors([torch.randn(s, dtype=torch.float64) for s in kind.shapes(grid, rows, 4)], grid, rows, x)
    out = kind.reduce(x, factors, grid, rows)
    for b, h in np.ndindex(2, 3):
        torch.testing.assert_close(out[b, h], kind.reduce(x[b, h], factors, grid, rows), **EXACT)


@pytest.mark.parametrize('side', [8, 16, 32, 64])
def test_initial_gain_is_one_at_every_length(side):
    N = side * side
    linear = Projection('linear', 'layerwise', [(4, 4)], (side, side), 1, 4)
    assert math.sqrt(N) * linear.weights[0].std().item() == pytest.approx(1, rel=0.05)
    separable = Projection('separable', 'layerwise', [(8, 8)], (side, side), 1, 4)
    E = torch.kron(*separable.weights)
    assert math.sqrt(N) * E.std().item() == pytest.approx(1, rel=0.15)  # of 16·side numbers drawn
    conv = Projection('conv', 'layerwise', [(2, 2)], (side, side), 1, 64)
    assert side / 2 * conv.weights[0].std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize('weight_init', ['', 'jax', 'moco', 'skip', 'reset'])
@pytest.mark.parametrize('kind, summed', [('linear', 256), ('separable', 16), ('conv', 4)])
def test_timm_initialisers_leave_the_gain_at_one(kind, summed, weight_init):
    model = timm.create_model('test_linformer_vit', projection=kind, proj_len=64, weight_init=weight_init)
    for again in (False, True):
        if again:
            model.init_weights()
        for weight in model.projection.weights:
            assert weight.std().item() * math.sqrt(summed) == pytest.approx(1, rel=0.25)


@pytest.mark.parametrize(
    'K, rows', [(1, (1, 1)), (7, (1, 7)), (12, (3, 4)), (16, (4, 4)), (50, (5, 10)), (256, (16, 16))]
)
def test_rows_form_the_grid_nearest_to_a_square(K, rows):
    assert row_grid(K) == rows


@pytest.mark.parametrize(
    'kind, sharing, proj_len, message',
    [
        ('linaer', 'layerwise', 4, r"Unknown projection 'linaer'. Nearest: linear"),
        ('seperable', 'layerwise', 4, r"Unknown projection 'seperable'. Nearest: separable"),
        ('linear', 'layer_wise', 4, r"Unknown sharing 'layer_wise'. Nearest: layerwise"),
        ('linear', 'keyvalue', 4, r"Unknown sharing 'keyvalue'. Nearest: key_value"),
        ('linear', 'layerwise', 0, r'at least 1 and at most 1,048,576, got 0'),
        ('linear', 'layerwise', -3, r'at least 1 and at most 1,048,576, got -3'),
        ('linear', 'layerwise', 2.5, r'a whole number of at least 1 and at most 1,048,576, got 2\.5'),
        ('linear', 'layerwise', '64', r"a whole number of at least 1 and at most 1,048,576, got '64'"),
        ('linear', 'key_value', [4, 0, 4], r'at least 1 and at most 1,048,576, got \[4, 0, 4\]'),
        ('linear', 'key_value', [], r'at least 1 and at most 1,048,576, got \[\]'),
        ('linear', 'key_value', [4, 4], r'gives 2 lengths for 3 layers'),
        ('linear', 'layerwise', [4, 8, 4], r'K cannot differ by layer \(got proj_len=\[4, 8, 4\]\).*key_value'),
    ],
)
def test_choices_that_do_not_exist_are_refused(kind, sharing, proj_len, message):
    with pytest.raises(ValueError, match=message):
        projected_rows(kind, sharing, proj_len, DEPTH)
    with pytest.raises(ValueError, match=message):  # and by the model
        timm.create_model('test_linformer_vit', depth=3, projection=kind, sharing=sharing, proj_len=proj_len)


@pytest.mark.parametrize('kind', LEARNED)
def test_projection_has_its_gradient_although_it_is_not_used(kind):
    projection = build(kind, 'headwise')
    x = torch.randn(3, dtype=torch.float64)
    assert torch.equal(projection.zero(x), x)
    projection.zero(x).sum().backward()
    for weight in projection.weights:
        assert torch.equal(weight.grad, torch.zeros_like(weight))
