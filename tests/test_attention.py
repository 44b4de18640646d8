"""Attention over K rows against outside oracles: the paper's equation 7 in loops, the PyPI package and timm."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from linformer.linformer import LinformerSelfAttention
from timm.layers import Attention, set_fused_attn
from torch import nn
from torch.nn.utils import parametrize

from linvision.models.attention import LinformerAttention
from linvision.models.projection import SHARING, Projection, projected_rows

GRID = (4, 6)
N, D, HEADS, DEPTH = 24, 12, 3, 3
LENGTHS = [4, 6, 8]
FULL = dict(rtol=1e-10, atol=1e-10)  # float64


def randomise(module: nn.Module) -> None:
    """Every parameter from N(0, 0.25), biases and norms included, so that none can be forgotten."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)


def written_out(projection: Projection, kind: str, sharing: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """E and F of a layer for every head, (H, K, N), separable ones as Kronecker products."""
    per_matrix = {'linear': 1, 'separable': 2}[kind]
    first = 0 if sharing == 'layerwise' else layer * SHARING[sharing] * per_matrix
    weights = [w.detach().numpy() for w in projection.weights][first : first + SHARING[sharing] * per_matrix]
    pair = []
    for i in (0, len(weights) - per_matrix):  # the same one where E = F
        factors = [w if sharing == 'none' else np.stack([w] * HEADS) for w in weights[i : i + per_matrix]]
        E = factors[0].reshape(HEADS, -1, N) if kind == 'linear' else None
        pair.append(E if kind == 'linear' else np.stack([np.kron(*f) for f in zip(*factors, strict=True)]))
    return pair[0], pair[1]


def equation_7(x: torch.Tensor, attention: nn.Module, E: np.ndarray, F: np.ndarray, prefix: int) -> torch.Tensor:
    """Heads before the output projection, in the paper's order: keys and values first, then E and F, head by head."""
    weight, bias = attention.qkv.weight.detach().numpy(), attention.qkv.bias.detach().numpy()
    out = np.zeros(x.shape)
    d = D // HEADS
    for b, tokens in enumerate(x.detach().numpy()):
        query, key, value = np.split(tokens @ weight.T + bias, 3, axis=1)
        for h in range(HEADS):
            head = slice(h * d, (h + 1) * d)
            keys = np.concatenate([key[:prefix, head], E[h] @ key[prefix:, head]])
            values = np.concatenate([value[:prefix, head], F[h] @ value[prefix:, head]])
            weights = np.exp(query[:, head] @ keys.T / np.sqrt(d))
            out[b, :, head] = weights / weights.sum(axis=1, keepdims=True) @ values
    return torch.from_numpy(out)


def build(kind: str, sharing: str, prefix: int = 0, layer: int = 1, **kwargs) -> tuple[LinformerAttention, Projection]:
    rows = projected_rows(kind, sharing, 6 if sharing == 'layerwise' else LENGTHS, DEPTH)
    projection = Projection(kind, sharing, rows, GRID, HEADS, D, dtype=torch.float64)
    attention = LinformerAttention(
        D,
        HEADS,
        qkv_bias=True,
        projection=kind,
        sharing=sharing,
        rows=rows[layer],
        num_prefix_tokens=prefix,
        dtype=torch.float64,
        **kwargs,
    )
    randomise(projection)
    randomise(attention)
    return attention, projection


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('prefix', [0, 2])
@pytest.mark.parametrize('sharing', SHARING)
@pytest.mark.parametrize('kind', ['linear', 'separable'])
def test_attention_equals_equation_7(kind, sharing, prefix, fused):
    set_fused_attn(fused)
    for layer in range(DEPTH):
        attention, projection = build(kind, sharing, prefix, layer)
        assert attention.fused_attn == fused
        x = torch.randn(2, prefix + N, D, dtype=torch.float64)
        heads = equation_7(x, attention, *written_out(projection, kind, sharing, layer), prefix)
        torch.testing.assert_close(attention(x, projection(x, GRID)[layer], GRID), attention.proj(heads), **FULL)


@pytest.mark.parametrize('sharing', SHARING)
@pytest.mark.parametrize('kind', ['linear', 'separable'])
def test_model_hands_each_block_its_own_matrices(kind, sharing):
    model = timm.create_model(
        'test_linformer_vit', img_size=GRID, embed_dim=D, depth=DEPTH, num_heads=HEADS, local_size=0, class_token=True,
        projection=kind, sharing=sharing, proj_len=6 if sharing == 'layerwise' else LENGTHS, dtype=torch.float64,
        row_norm=False,
    )  # fmt: skip
    randomise(model)
    seen = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, args, output: seen.append((module, args[0], output)))
    model(torch.randn(2, 3, *GRID, dtype=torch.float64))
    assert len(seen) == DEPTH
    for layer, (attention, x, output) in enumerate(seen):
        heads = equation_7(x, attention, *written_out(model.projection, kind, sharing, layer), prefix=1)
        torch.testing.assert_close(output, attention.proj(heads), **FULL)


@pytest.mark.parametrize('share_kv', [False, True])
def test_attention_equals_the_pypi_package(share_kv):
    sharing = 'key_value' if share_kv else 'headwise'
    theirs = LinformerSelfAttention(D, N, k=6, heads=HEADS, share_kv=share_kv).double()
    projection = Projection('linear', sharing, [(2, 3)], GRID, HEADS, D, dtype=torch.float64)
    ours = LinformerAttention(
        D, HEADS, projection='linear', sharing=sharing, rows=projection.row_grids[0], dtype=torch.float64
    )
    value = theirs.to_k if share_kv else theirs.to_v  # with share_kv it has one weight for keys and values
    ours.load_state_dict(
        {
            'qkv.weight': torch.cat([theirs.to_q.weight, theirs.to_k.weight, value.weight]),
            'proj.weight': theirs.to_out.weight,
            'proj.bias': theirs.to_out.bias,
        }
    )
    matrices = [theirs.proj_k] if share_kv else [theirs.proj_k, theirs.proj_v]  # each (N, K)
    projection.load_state_dict({f'weights.{i}': matrix.T.unflatten(1, GRID) for i, matrix in enumerate(matrices)})
    x = torch.randn(2, N, D, dtype=torch.float64)
    torch.testing.assert_close(ours(x, projection(x, GRID)[0], GRID), theirs(x), **FULL)


@pytest.mark.parametrize('sharing', SHARING)
def test_rows_are_normalised_before_the_weights_and_keys_and_values_where_heads_have_their_own_e(sharing):
    attention, projection = build('linear', sharing, row_norm=True)
    E, values = (torch.from_numpy(m) for m in written_out(projection, 'linear', sharing, 1))  # (H, K, N)
    x = torch.randn(2, N, D, dtype=torch.float64)
    weights = attention.qkv.weight.view(3, HEADS, -1, D)[1:], attention.qkv.bias.view(3, HEADS, 1, -1)[1:]
    expected = []
    for matrix, weight, bias in zip((E, values), *weights, strict=True):  # weight (H, D/H, D), bias (H, 1, D/H)
        if sharing == 'none':
            rows = matrix @ (x.unsqueeze(1) @ weight.mT + bias)  # (B, H, K, D/H)
            expected.append(F.layer_norm(rows, (rows.shape[-1],)))
        else:
            rows = F.layer_norm(matrix @ x.unsqueeze(1), (D,))  # (B, H, K, D)
            expected.append(rows @ weight.mT + matrix.sum(-1, keepdim=True) * bias)
    found = attention.key_value(x, projection(x, GRID)[1], GRID, None, attention.split_weights(x))[:2]
    torch.testing.assert_close(found, tuple(expected), **FULL)


def permutation(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)[torch.randperm(n)]


@pytest.mark.parametrize('norms', [False, True])
@pytest.mark.parametrize('prefix', [0, 2])
@pytest.mark.parametrize('kind, sharing', [('linear', 'layerwise'), ('linear', 'none'), ('separable', 'key_value')])
def test_a_permutation_as_projection_gives_timm_attention(kind, sharing, prefix, norms, monkeypatch):
    arguments = dict(qkv_bias=True, qk_norm=norms, scale_norm=norms, norm_layer=nn.LayerNorm, dtype=torch.float64)
    theirs = Attention(D, HEADS, **arguments)
    randomise(theirs)
    rows = projected_rows(kind, sharing, N, 1)
    assert rows == [GRID]
    projection = Projection(kind, sharing, rows, GRID, HEADS, D, dtype=torch.float64)
    ours = LinformerAttention(
        D, HEADS, projection=kind, sharing=sharing, rows=GRID, num_prefix_tokens=prefix, **arguments
    )
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for weight in projection.weights:
            if sharing == 'none':
                weight.copy_(torch.stack([permutation(N) for _ in range(HEADS)]).unflatten(-1, GRID))
            else:
                weight.copy_(permutation(weight.shape[0]).view_as(weight))
        if sharing == 'none':
            projection.weights[1].copy_(projection.weights[0])  # keys and values in the same order
    x = torch.randn(2, prefix + N, D, dtype=torch.float64)
    torch.testing.assert_close(ours(x, projection(x, GRID)[0], GRID), theirs(x), **FULL)  # K = N: full attention
    monkeypatch.setattr(LinformerAttention, 'is_full', lambda self, grid: False)
    torch.testing.assert_close(ours(x, projection(x, GRID)[0], GRID), theirs(x), **FULL)  # through the permutation


@pytest.mark.parametrize('sharing', SHARING)
def test_local_path_joins_the_heads_before_the_output_projection(sharing):
    attention, projection = build('separable', sharing, prefix=1, local_size=3)
    x = torch.randn(2, 1 + N, D, dtype=torch.float64)
    heads = equation_7(x, attention, *written_out(projection, 'separable', sharing, 1), prefix=1)
    image = F.pad(x[:, 1:].unflatten(1, GRID), (0, 0, 1, 1, 1, 1))  # (B, h + 2, w + 2, D)
    local = torch.zeros_like(x)
    for i in range(GRID[0]):
        for j in range(GRID[1]):
            window = image[:, i : i + 3, j : j + 3]  # (B, 3, 3, D)
            local[:, 1 + i * GRID[1] + j] = torch.einsum('byxd,dyx->bd', window, attention.local.weight[:, 0])
    torch.testing.assert_close(attention(x, projection(x, GRID)[1], GRID), attention.proj(heads + local), **FULL)


def test_new_local_path_adds_nothing():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    local = timm.create_model('test_linformer_vit', local_size=3).eval()
    plain = timm.create_model('test_linformer_vit', local_size=0).eval()
    missing, unexpected = plain.load_state_dict(local.state_dict(), strict=False)
    assert not missing and all('attn.local' in name for name in unexpected) and len(unexpected) == 3
    assert torch.equal(local(images), plain(images))


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('sharing', SHARING)
def test_bf16_error_is_at_most_twice_that_of_plain_pytorch(sharing, training):
    attention, projection = build('linear', sharing, prefix=1)
    x = torch.randn(2, 1 + N, D, dtype=torch.float64)
    exact = attention(x, projection(x, GRID)[1], GRID)
    E, F_ = (torch.from_numpy(m).bfloat16() for m in written_out(projection, 'linear', sharing, 1))  # (H, K, N)
    attention.bfloat16()
    projection.bfloat16()
    x = x.bfloat16()
    with torch.set_grad_enabled(training):  # on CPUs two paths
        ours = attention(x, projection(x, GRID)[1], GRID)
    with torch.no_grad():
        query, key, value = attention.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, 1 + N, D/H)
        key, value = (torch.cat([t[:, :, :1], m @ t[:, :, 1:]], dim=2) for t, m in ((key, E), (value, F_)))
        weights = (query @ key.mT * attention.head_dim**-0.5).softmax(-1)
        plain = attention.proj((weights @ value).transpose(1, 2).flatten(2))
    assert (ours - exact).abs().mean() <= 2 * (plain - exact).abs().mean()


def test_width_must_be_divisible_by_the_heads():
    with pytest.raises(ValueError, match=r'divisible by the number of heads, got 12 and 5'):
        LinformerAttention(12, num_heads=5)


class Doubled(nn.Linear):
    """An adapter of which only `forward` tells."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Bent(nn.Linear):
    """No linear function, though its weight says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.relu())


@pytest.mark.parametrize('chunk_size', [0, 64])
def test_a_linear_wrapper_of_qkv_counts(chunk_size):
    model = timm.create_model('test_linformer_vit', chunk_size=chunk_size, dtype=torch.float64).eval()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.blocks[1].attn.qkv.parameters():
            parameter *= 2
    doubled = Doubled(32, 96, dtype=torch.float64)
    doubled.load_state_dict(model.blocks[1].attn.qkv.state_dict())
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for wrapped in (doubled, nn.Sequential(changed.blocks[1].attn.qkv)):
        model.blocks[1].attn.qkv = wrapped
        torch.testing.assert_close(model(images), changed(images))


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('chunk_size', [0, 64])
def test_a_wrapper_of_qkv_that_is_not_linear_is_refused(chunk_size, training):
    model = timm.create_model('test_linformer_vit', chunk_size=chunk_size)
    qkv = model.blocks[1].attn.qkv
    for wrapped, words in (
        (Bent(32, 96), r'must be an nn\.Linear.*and that of.*Bent.*attn\.proj'),
        (nn.Sequential(nn.Dropout(0.1), qkv), r'0 drops a share of 0\.1.*set its rate to 0'),
    ):
        model.blocks[1].attn.qkv = wrapped
        with torch.set_grad_enabled(training), pytest.raises(TypeError, match=words):
            model(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize('chunk_size', [0, 64])
def test_a_parametrization_of_qkv_counts(chunk_size):
    model = timm.create_model('test_linformer_vit', chunk_size=chunk_size, dtype=torch.float64).eval()
    changed = copy.deepcopy(model)
    added = 0.1 * torch.randn(96, 2, dtype=torch.float64) @ torch.randn(2, 32, dtype=torch.float64)
    for ours, theirs in zip(model.blocks, changed.blocks, strict=True):
        parametrize.register_parametrization(ours.attn.qkv, 'weight', Added(added))
        with torch.no_grad():
            theirs.attn.qkv.weight += added
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(images), changed(images))
    with torch.no_grad():
        torch.testing.assert_close(model(images), changed(images))


class Added(nn.Module):
    """A weight plus a low-rank matrix."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.matrix
