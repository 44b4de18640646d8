"""Rows whose weights the tokens give, against the softmax written out and `torch.nn.MultiheadAttention`."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from linvision.analysis import difference_between_images, projection_matrices, tokens_of_images
from linvision.models.projection import SHARING, Projection
from linvision.models.projection_kinds import Dynamic, Separable

GRID, ROWS, DIM = (6, 10), (2, 3), 8
N, K = 60, 6


def weights(heads: tuple[int, ...] = (), dim: int = DIM, scale: float = 0.5) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [scale * torch.randn(*heads, *s, dtype=torch.float64) for s in Dynamic.shapes(GRID, ROWS, dim)]


def written_out(x: torch.Tensor, content: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """E for tokens (N, D), row by row and token by token: (K, N)."""
    E = torch.empty(K, N, dtype=x.dtype)
    for k in range(K):
        i, j = divmod(k, ROWS[1])
        down, across, log_down, log_across = prior[:, i, j].tolist()
        centre = (i + 0.5 + down) / ROWS[0], (j + 0.5 + across) / ROWS[1]
        width = math.exp(log_down) / ROWS[0] / 12**0.5, math.exp(log_across) / ROWS[1] / 12**0.5
        for n in range(N):
            place = (n // GRID[1] + 0.5) / GRID[0], (n % GRID[1] + 0.5) / GRID[1]
            distance = sum(((p - c) / s) ** 2 for p, c, s in zip(place, centre, width, strict=True))
            E[k, n] = content[:, i, j] @ x[n] - distance / 2
    return E.softmax(-1)


def model_of(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    arguments = dict(projection='dynamic', proj_len=6, img_size=(8, 6), num_classes=5, depth=2, dtype=torch.float64)
    model = timm.create_model('test_linformer_vit', **{**arguments, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def test_rows_and_gradients_are_those_of_the_softmax_written_out():
    content, prior = (w.requires_grad_() for w in weights())
    x = torch.randn(2, N, DIM, dtype=torch.float64, requires_grad=True)
    factors = Dynamic.factors([content, prior], GRID, ROWS, x)
    found = Dynamic.reduce(x, factors, GRID, ROWS)
    wanted = torch.stack([written_out(tokens, content, prior) @ tokens for tokens in x])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    inputs = (x, content)  # `written_out` reads the prior as numbers
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(wanted.square().sum(), inputs),
        rtol=1e-9,
        atol=1e-9,
    )


def test_gradients_are_those_of_finite_differences():
    def function(x, *weights):
        return Dynamic.reduce(x, Dynamic.factors(list(weights), GRID, ROWS, x), GRID, ROWS)

    x = torch.randn(2, N, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *(w.requires_grad_() for w in weights())), fast_mode=True)


@pytest.mark.parametrize('heads', [1, 2])
def test_without_a_prior_rows_are_those_of_multi_head_attention_with_learned_queries(heads):
    width = DIM // heads
    content, prior = weights((heads,), width)
    prior[:, 2:] = 25.0  # σ of e²⁵ cells
    theirs = nn.MultiheadAttention(DIM, heads, bias=False, batch_first=True, dtype=torch.float64)
    eye = torch.eye(DIM, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([eye * width**0.5, eye, eye]))
        theirs.out_proj.weight.copy_(eye)
    x = torch.randn(3, N, DIM, dtype=torch.float64)
    inside = torch.rand(3, N) < 0.6
    queries = content.flatten(-2).permute(2, 0, 1).flatten(1)  # (K, D)
    wanted, _ = theirs(queries.expand(3, -1, -1), x, x, key_padding_mask=~inside)
    tokens = x.unflatten(-1, (heads, width)).transpose(1, 2)  # (B, H, N, D/H)
    factors = [*Dynamic.factors([content, prior], GRID, ROWS, x), inside]
    found = Dynamic.reduce(tokens, factors, GRID, ROWS).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, wanted)


def test_rows_know_nothing_of_padding_however_far_the_tokens_that_are_left():
    content, prior = weights()
    prior[2:] = -2.0  # rows as narrow as a seventh of a cell
    x = torch.randn(1, N, DIM, dtype=torch.float64, requires_grad=True)
    inside = torch.zeros(1, N, dtype=torch.bool)
    inside[0, [0, 7, 12]] = True
    factors = Dynamic.factors([content, prior], GRID, ROWS, x)
    found = Dynamic.reduce(x, [*factors, inside], GRID, ROWS)
    weights_ = written_out(x[0], content, prior)
    scores = weights_.log().masked_fill(~inside, -math.inf)
    reachable = scores.isfinite().any(-1)  # others underflow where the softmax over all is written out
    torch.testing.assert_close(found[0, reachable], (scores.softmax(-1) @ x[0])[reachable])
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert found.isfinite().all() and not gradient[~inside].any() and gradient[inside].any()
    parts = Dynamic.partial(x, [*factors, inside], slice(0, GRID[0]), GRID, ROWS)
    torch.testing.assert_close(Dynamic.finish(parts), found)


def test_parts_without_any_token_merge_to_nothing():
    x = torch.randn(2, N, DIM, dtype=torch.float64)
    factors = Dynamic.factors(weights(), GRID, ROWS, x)
    inside = torch.ones(2, N, dtype=torch.bool)
    empty = Dynamic.partial(x, [*factors, ~inside], slice(0, GRID[0]), GRID, ROWS)
    part = Dynamic.partial(x, [*factors, inside], slice(0, GRID[0]), GRID, ROWS)
    for pair in ((empty, part), (part, empty)):
        assert torch.equal(Dynamic.merge(*pair), part)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_error_is_at_most_twice_that_of_the_softmax_written_out(dtype):
    grid, rows = (64, 64), (16, 16)  # far from the middle the prior's terms are in the hundreds
    torch.manual_seed(0)
    own = [0.1 * torch.randn(s) for s in Dynamic.shapes(grid, rows, 16)]
    own[0] = own[0].to(dtype).float()
    x = torch.randn(1, 64 * 64, 16).to(dtype)
    exact = Dynamic.matrix(x.double(), Dynamic.factors([w.double() for w in own], grid, rows, x.double())) @ x.double()
    factors = [f.to(dtype) for f in Dynamic.factors(own, grid, rows, x)]
    plain = (Dynamic.matrix(x.float(), Dynamic.factors(own, grid, rows, x.float())).to(dtype) @ x) - exact
    parts = Dynamic.partial(x, factors, slice(0, grid[0]), grid, rows)
    for found in (Dynamic.reduce(x, factors, grid, rows), Dynamic.finish(parts)):
        assert (found - exact).norm() <= 2 * plain.norm()


def test_no_matrix_of_k_by_n_is_kept_for_the_backward_pass():
    grid, rows = (32, 32), (8, 8)
    own = [0.1 * torch.randn(s, requires_grad=True) for s in Dynamic.shapes(grid, rows, DIM)]
    x = torch.randn(1, 1024, DIM, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        Dynamic.reduce(x, Dynamic.factors(own, grid, rows, x), grid, rows)
    assert 1024 * DIM <= max(kept) < 1024 * 64 / 4


@pytest.mark.parametrize('sharing', SHARING)
def test_pooled_rows_are_soft_cells_at_every_size_and_k(sharing):
    for grid, rows in ((GRID, ROWS), ((12, 12), (3, 3))):
        projection = Projection('dynamic', sharing, [rows] * 2, grid, 2, DIM, dtype=torch.float64)
        projection.pool()
        x = torch.zeros(grid[0] * grid[1], 1, dtype=torch.float64)
        E = Dynamic.matrix(None, projection(x, grid)[1][:2]).reshape(-1, rows[0] * rows[1], len(x))
        cells = torch.kron(*Separable.pooling(grid, rows, x))
        place = torch.cartesian_prod(*((torch.arange(n, dtype=x.dtype) + 0.5) / n for n in grid))
        for soft in E:
            torch.testing.assert_close(soft.sum(-1), torch.ones(len(soft), dtype=x.dtype))
            assert (soft * cells).sum(-1).mul(grid[0] * grid[1] / len(cells)).min() > 0.6  # the part within the cell
            torch.testing.assert_close(soft @ place, cells @ place, rtol=0, atol=0.03)  # about the same middle


def test_another_k_starts_with_the_rows_that_it_is_cut_from():
    model = model_of(proj_len=4)
    with torch.no_grad():
        for w, value in zip(model.projection.weights, (0.3, 0.0), strict=True):
            w.fill_(value)
    larger = model_of(proj_len=16)
    larger.load_state_dict(model.state_dict())
    content, prior = larger.projection.weights
    assert content.shape == (32, 4, 4) and prior.shape == (4, 4, 4)
    assert (content == 0.3).all() and not prior.any()  # soft cells, a quarter as large


def test_no_parameter_depends_on_the_number_of_tokens():
    model = model_of()
    before = {n: p.shape for n, p in model.projection.named_parameters()}
    model.set_input_size((40, 16))
    assert {n: p.shape for n, p in model.projection.named_parameters()} == before


@pytest.mark.parametrize('sharing', SHARING)
def test_written_out_matrices_give_what_the_model_computes_with(sharing):
    model = model_of(sharing=sharing, class_token=True, global_pool='token', row_norm=False)
    images, attention = torch.randn(2, 3, 8, 6, dtype=torch.float64), model.blocks[1].attn
    with torch.no_grad():
        tokens = tokens_of_images(model, images, 1)
        _, E = projection_matrices(model, 1, tokens)
        x = tokens[:, 1:]
        _, value = attention.heads_key_value(x, attention.split_weights(x))
        wanted = (E if E.ndim == 4 else E.unsqueeze(1)) @ value
        tensors = model.projection_tensors(images, (8, 6))[1]
        _, found, _ = attention.key_value(tokens, tensors, (8, 6), None, attention.split_weights(tokens))
    torch.testing.assert_close(found[:, :, 1:], wanted)


def test_rows_differ_from_image_to_image_by_their_content_alone():
    images = torch.randn(3, 3, 8, 6, dtype=torch.float64)
    model = model_of()
    assert difference_between_images(projection_matrices(model, 1, tokens_of_images(model, images, 1))[0]) > 0.05
    with torch.no_grad():
        model.projection.weights[0].zero_()
    E, _ = projection_matrices(model, 1, tokens_of_images(model, images, 1))
    assert difference_between_images(E) < 1e-12
    torch.testing.assert_close(E[0], projection_matrices(model, 1)[0])
    apart = torch.eye(2, dtype=torch.float64).unsqueeze(1)  # (B, K, N): each image its own token
    assert difference_between_images(apart) == 1.0


def test_content_starts_near_zero_whatever_timm_initialises():
    for weight_init in ('', 'jax', 'moco', 'skip', 'reset'):
        model = timm.create_model('test_linformer_vit', projection='dynamic', proj_len=64, weight_init=weight_init)
        content, prior = model.projection.weights
        assert content.std().item() * 32**0.5 == pytest.approx(0.1, rel=0.25)
        assert prior.std().item() == pytest.approx(0.05, rel=0.25)
        x = F.layer_norm(torch.randn(1, 256, 32), (32,))
        factors = Dynamic.factors([content, prior], (16, 16), (8, 8), x)
        torch.testing.assert_close(Dynamic.matrix(x, factors)[0], Dynamic.matrix(None, factors), rtol=0, atol=0.1)
