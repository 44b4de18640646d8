"""The K×N matrices: their layout, scale and row sums against matrices written out, and what is refused."""

import math

import pytest
import timm
import torch

from linvision.projection import SHARING, Projection, row_grid

GRID = (4, 6)  # not square, so that a swapped axis shows
DEPTH, HEADS = 3, 2
LENGTHS = [6, 8, 4]  # one K a layer


def build(kind: str, sharing: str, **kwargs) -> Projection:
    """A float64 projection; one K for all layers where they share one matrix, else one a layer."""
    proj_len = 6 if sharing == 'layerwise' else LENGTHS
    return Projection(kind, sharing, proj_len, GRID, DEPTH, HEADS, dtype=torch.float64, **kwargs)


def written_out(projection: Projection, kind: str, sharing: str, layer: int) -> list[torch.Tensor]:
    """E (and F) of a layer as matrices, by the order of the parameters: layer, then E and F, then factors."""
    per_matrix = {'linear': 1, 'separable': 2}[kind]
    first = 0 if sharing == 'layerwise' else layer * SHARING[sharing] * per_matrix
    matrices = []
    for i in range(first, first + SHARING[sharing] * per_matrix, per_matrix):
        factors = list(projection.weights[i : i + per_matrix])
        if kind == 'linear':
            matrices.append(factors[0])
        elif sharing == 'none':
            matrices.append(torch.stack([torch.kron(a, b) for a, b in zip(*factors, strict=True)]))
        else:
            matrices.append(torch.kron(*factors))
    return matrices


@pytest.mark.parametrize('sharing', SHARING)
@pytest.mark.parametrize('kind', ['linear', 'separable'])
def test_every_layer_gets_its_own_matrices_and_their_row_sums(kind, sharing):
    projection = build(kind, sharing)
    heads = (HEADS,) if sharing == 'none' else ()
    x = torch.randn(2, *heads, GRID[0] * GRID[1], 5, dtype=torch.float64)
    tensors = projection()
    assert len(tensors) == DEPTH
    for layer in range(DEPTH):
        matrices = written_out(projection, kind, sharing, layer)
        n = len(tensors[layer]) // len(matrices)
        for i, matrix in enumerate(matrices):
            *factors, sums = tensors[layer][i * n : (i + 1) * n]
            rows = projection.row_grids[0 if sharing == 'layerwise' else layer]
            torch.testing.assert_close(projection.reduce(x, factors, GRID, rows), matrix @ x, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(sums, matrix.sum(-1), rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize('side', [8, 16, 32, 64])
def test_initial_gain_is_one_at_every_length(side):
    N = side * side
    linear = Projection('linear', 'layerwise', 16, (side, side), 1, 1)
    assert math.sqrt(N) * linear.weights[0].std().item() == pytest.approx(1, rel=0.05)
    separable = Projection('separable', 'layerwise', 64, (side, side), 1, 1)
    E = torch.kron(*separable.weights)
    assert math.sqrt(N) * E.std().item() == pytest.approx(1, rel=0.15)  # of 16·side numbers drawn


@pytest.mark.parametrize('weight_init', ['', 'jax', 'moco', 'skip', 'reset'])
@pytest.mark.parametrize('kind', ['linear', 'separable'])
def test_timm_initialisers_leave_the_gain_at_one(kind, weight_init):
    model = timm.create_model('test_linformer_vit', projection=kind, proj_len=64, weight_init=weight_init)
    for again in (False, True):
        if again:
            model.init_weights()
        for weight in model.projection.weights:
            assert weight.std().item() * math.sqrt(weight.shape[-1]) == pytest.approx(1, rel=0.25)


@pytest.mark.parametrize('grid', [(8, 8), (4, 16), (16, 4), (5, 9), (1, 12), (12, 1)])
@pytest.mark.parametrize('K', [1, 7, 12, 16, 64])
def test_row_grid_has_k_rows_in_the_shape_nearest_to_the_token_grid(K, grid):
    def distortion(k_h, k_w):
        return max(k_h / k_w * grid[1] / grid[0], k_w / k_h * grid[0] / grid[1])

    k_h, k_w = row_grid(K, grid)
    assert k_h * k_w == K
    best = min(distortion(a, K // a) for a in range(1, K + 1) if K % a == 0)
    assert distortion(k_h, k_w) == pytest.approx(best)


@pytest.mark.parametrize(
    'kind, sharing, proj_len, message',
    [
        ('linaer', 'layerwise', 4, r"Unknown projection 'linaer'. Nearest: linear"),
        ('seperable', 'layerwise', 4, r"Unknown projection 'seperable'. Nearest: separable"),
        ('linear', 'layer_wise', 4, r"Unknown sharing 'layer_wise'. Nearest: layerwise"),
        ('linear', 'keyvalue', 4, r"Unknown sharing 'keyvalue'. Nearest: key_value"),
        ('linear', 'layerwise', 0, r'must be at least 1, got 0'),
        ('linear', 'layerwise', -3, r'must be at least 1, got -3'),
        ('linear', 'key_value', [4, 0, 4], r'must be at least 1, got \[4, 0, 4\]'),
        ('linear', 'key_value', [], r'must be at least 1, got \[\]'),
        ('linear', 'key_value', [4, 4], r'gives 2 lengths for 3 layers'),
        ('linear', 'layerwise', [4, 8, 4], r'K cannot differ by layer \(got proj_len=\[4, 8, 4\]\).*key_value'),
    ],
)
def test_choices_that_do_not_exist_are_refused(kind, sharing, proj_len, message):
    with pytest.raises(ValueError, match=message):
        Projection(kind, sharing, proj_len, GRID, DEPTH, HEADS)
    with pytest.raises(ValueError, match=message):  # and by the model
        timm.create_model('test_linformer_vit', depth=3, projection=kind, sharing=sharing, proj_len=proj_len)


def test_projection_has_its_gradient_although_it_is_not_used():
    projection = build('separable', 'headwise')
    assert projection.zero().item() == 0
    projection.zero().backward()
    for weight in projection.weights:
        assert torch.equal(weight.grad, torch.zeros_like(weight))
