"""Streaming equals plain: outputs, gradients, dropout, and what must stay as it is while blocks are streamed."""

import itertools
import math

import pytest
import timm
import torch
from runs import KINDS_AND_SHARING
from timm.models import save_for_hf
from torch import nn

from linvision.streaming import chunk_size, cpu_kernels
from linvision.streaming.chunk_size import auto_chunk_size

PREFIX = dict(class_token=True, reg_tokens=2, global_pool='token')
CHUNKS = [1, 24, 30, 100, 1000]  # below a row of 8 × 6 tokens … above three images


def create(dtype=torch.float64, seed: int = 0, **kwargs) -> nn.Module:
    """A model of 8 × 6 tokens whose weights are far from the initial ones."""
    torch.manual_seed(seed)
    arguments = dict(num_classes=5, img_size=(8, 6), proj_len=6, chunk_size=0, local_grid=0)
    model = timm.create_model('test_linformer_vit', **{**arguments, **kwargs}, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def batch(n: int = 3, size: tuple[int, int] = (8, 6), dtype=torch.float64) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(n, 3, *size, dtype=dtype)


def padding(n: int = 3) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.rand(n, 48) < 0.3


def gradients(model: nn.Module, images: torch.Tensor, seed: int = 3, **kwargs) -> dict[str, torch.Tensor]:
    """Loss and gradients of every parameter and of the images."""
    model.zero_grad(set_to_none=True)
    images = images.clone().requires_grad_()
    torch.manual_seed(seed)
    loss = model(images, **kwargs).square().sum()
    loss.backward()
    return {'loss': loss.detach(), 'images': images.grad, **{n: p.grad for n, p in model.named_parameters()}}


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Chunk sizes of every streamed block."""
    import linvision.models.block

    seen, stream = [], linvision.models.block.stream
    monkeypatch.setattr(linvision.models.block, 'stream', lambda *args: seen.append(args[5]) or stream(*args))
    return seen


@pytest.mark.parametrize('chunks, tokens', [([1, 100], {}), ([30, 1000], PREFIX)])
@pytest.mark.parametrize('kind, sharing', KINDS_AND_SHARING)
def test_streaming_equals_plain_without_and_with_gradients(kind, sharing, chunks, tokens, calls):
    assert_streamed_is_whole(create(projection=kind, sharing=sharing, depth=2, **tokens), chunks, calls)


@pytest.mark.parametrize(
    'arguments',
    [
        dict(projection='dynamic'),
        dict(projection='separable', local_size=5, local_grid=(2, 2)),
        dict(projection='linear', sharing='none'),
        dict(projection='none'),
    ],
    ids=lambda arguments: arguments['projection'],
)
def test_norms_over_all_tokens_stream(arguments, calls):
    assert_streamed_is_whole(create(token_norm=True, depth=2, **arguments), [1, 30, 100], calls)


def assert_streamed_is_whole(model: nn.Module, chunks: list[int], calls: list[int]) -> None:
    """Outputs and all gradients, with and without padding."""
    for arguments in (dict(), dict(key_padding_mask=padding())):
        model.set_chunk_size(0)
        with torch.no_grad():
            plain = model(batch(), **arguments)
        exact = gradients(model, batch(), **arguments)
        assert not calls
        for chunk in chunks:
            model.set_chunk_size(chunk)
            with torch.no_grad():
                torch.testing.assert_close(model(batch(), **arguments), plain, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(gradients(model, batch(), **arguments), exact, rtol=1e-9, atol=1e-9)
            assert calls == [chunk] * 4  # two blocks, twice
            calls.clear()


@pytest.mark.parametrize('local_grid', [(2, 2), (4, 3), (1, 6)])
def test_a_dilated_local_path_finds_its_neighbours_in_other_chunks(local_grid):
    model = create(local_grid=local_grid, local_size=5)
    plain, exact = model(batch()), gradients(model, batch())
    for chunk in CHUNKS:
        model.set_chunk_size(chunk)
        with torch.no_grad():
            torch.testing.assert_close(model(batch()), plain)
        torch.testing.assert_close(gradients(model, batch()), exact)


@pytest.mark.parametrize('kind, token_norm', [('separable', True), ('dynamic', False)])
def test_gradients_are_those_of_finite_differences(kind, token_norm):
    shape = dict(class_token=not token_norm, sharing='key_value', depth=2)
    model = create(projection=kind, token_norm=token_norm, chunk_size=14, **shape)

    def function(images, *weights):
        state = dict(zip((n for n, _ in model.named_parameters()), weights, strict=True))
        return torch.func.functional_call(model, state, (images,))

    inputs = (batch(2).requires_grad_(), *(p.detach().requires_grad_() for p in model.parameters()))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_gradients_are_those_of_the_weights_that_the_forward_pass_had():
    model = create(class_token=True)
    weights = {n: (p.detach() + 0.1 * torch.randn_like(p)).requires_grad_() for n, p in model.named_parameters()}

    def found() -> list[torch.Tensor]:
        loss = torch.func.functional_call(model, weights, (batch(),)).square().sum()
        return torch.autograd.grad(loss, list(weights.values()))

    exact = found()
    model.set_chunk_size(12)
    torch.testing.assert_close(found(), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('chunk_size', [24, 'auto'])
def test_gradients_by_torch_func_are_those_of_whole_blocks(chunk_size, monkeypatch):
    monkeypatch.setattr('linvision.streaming.chunk_size.KEPT_BYTES', 0)
    monkeypatch.setattr('linvision.streaming.chunk_size.chunk_tokens', lambda x, hidden: 24)
    model, images = create(), batch()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    gradient = torch.func.grad(lambda w: torch.func.functional_call(model, w, (images,)).square().sum())
    exact = gradient(weights)
    model.set_chunk_size(chunk_size)
    torch.testing.assert_close(gradient(weights), exact)


@pytest.mark.parametrize('token_norm', [False, True])
def test_dropout_is_the_same_in_both_passes(token_norm):
    model = create(chunk_size=24, proj_drop_rate=0.3, attn_drop_rate=0.2, token_norm=token_norm).train()
    images, eps = batch(), 1e-6
    exact = gradients(model, images)
    direction = torch.randn_like(images)

    def loss(x: torch.Tensor) -> float:
        torch.manual_seed(3)
        return model(x.requires_grad_()).square().sum().item()

    slope = (loss(images + eps * direction) - loss(images - eps * direction)) / (2 * eps)
    assert slope == pytest.approx((exact['images'] * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize('token_norm', [False, True])
def test_drop_path_is_drawn_once_for_each_image_and_block(token_norm):
    model = create(chunk_size=6, drop_path_rate=0.5, depth=2, token_norm=token_norm).train()
    block = model.blocks[1]
    x = torch.randn(64, 48, 32, dtype=torch.float64)
    projection = model.projection_tensors(x, (8, 6))[1]
    with torch.no_grad():
        for module in (block.attn.proj, block.mlp.fc2):  # each branch adds a constant: 1 and 10
            module.weight.zero_()
        block.attn.proj.bias.fill_(1.0)
        block.mlp.fc2.bias.fill_(10.0)
    for keep in (True, False):
        torch.manual_seed(0)
        with torch.set_grad_enabled(keep):
            added = block(x, projection, (8, 6), None, 6).detach() - x
        assert (added - added[:, :1]).abs().max() < 1e-9  # all tokens of an image alike
        found = {round(v) for v in added[:, 0, 0].tolist()}
        assert found == {0, 2, 20, 22}  # either branch, scaled by 1 / 0.5


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('autocast', [False, True])
def test_low_precision_error_is_at_most_twice_that_of_the_whole_block(dtype, autocast):
    model = create()
    images = batch(8)
    exact = model(images)
    model.to(torch.float32 if autocast else dtype)
    images = images.to(torch.float32 if autocast else dtype)
    errors = []
    for chunk in (0, 12):
        model.set_chunk_size(chunk)
        with torch.no_grad(), torch.autocast('cpu', dtype, enabled=autocast):
            errors.append((model(images) - exact).norm())
    assert errors[1] <= 2 * errors[0]


def test_training_in_autocast_gives_the_gradients_of_the_whole_block():
    model = create(dtype=torch.float32)
    exact = gradients(model, batch(dtype=torch.float32))
    errors = []
    for chunk in (0, 12):
        model.set_chunk_size(chunk)
        with torch.autocast('cpu', torch.bfloat16):
            found = gradients(model, batch(dtype=torch.float32))
        errors.append(math.fsum(((found[n] - exact[n]).norm() / exact[n].norm()).item() for n in exact))
    assert errors[1] <= 2 * errors[0]


def test_callers_tensors_are_not_changed(calls):
    model = create(chunk_size=12)
    images = batch()
    before = images.clone()
    with torch.no_grad():
        model(images)
        x = torch.randn(2, 48, 32, dtype=torch.float64)
        kept = x.clone()
        model.blocks[0](x, model.projection_tensors(x, (8, 6))[0], (8, 6), None, 12)
    assert torch.equal(images, before) and torch.equal(x, kept) and len(calls) == 4


def test_results_of_two_calls_do_not_share_memory():
    model = create(chunk_size=12)
    with torch.no_grad():
        first = model.forward_features(batch())
        kept = first.clone()
        model.forward_features(batch() + 1)
    assert torch.equal(first, kept)


@pytest.mark.parametrize('name', ['norm_pre', 'patch_drop', 'norm'])
def test_what_a_hook_before_or_after_the_blocks_holds_stays_as_it_was(name, calls):
    model = create(chunk_size=12)
    seen = []
    model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    with torch.no_grad():
        model(batch())
    assert len(calls) == 3 and torch.equal(*seen[0])


def test_blocks_are_whole_where_something_looks_into_them(calls):
    model, images = create(chunk_size=12), batch()
    seen = []
    handle = model.blocks[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    model(images)
    assert seen[0].shape[1] == 48 and not calls
    handle.remove()
    model(images)
    assert len(calls) == 3


def test_intermediates_are_streamed_and_each_keeps_its_own(calls):
    model, images = create(), batch()
    with torch.no_grad():
        final, plain = model.forward_intermediates(images)
        model.set_chunk_size(12)
        streamed_final, streamed = model.forward_intermediates(images)
    assert calls == [12] * 3
    torch.testing.assert_close([streamed_final, *streamed], [final, *plain], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_gradient_checkpointing_goes_with_streaming(checkpointing):
    model = create().train()
    exact = gradients(model, batch())
    model.set_chunk_size(12)
    model.set_grad_checkpointing(checkpointing)
    torch.testing.assert_close(gradients(model, batch()), exact)


def test_only_the_blocks_inputs_are_kept_for_the_backward_pass():
    model = create(img_size=(32, 32), proj_len=16, dtype=torch.float32).train()
    images = batch(2, (32, 32), torch.float32)

    def kept() -> int:
        storages = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images)
        return sum(storages.values())

    whole = kept()
    model.set_chunk_size(128)
    assert kept() < whole / 5


def test_a_checkpoint_trained_streamed_loads_unstreamed(tmp_path):
    streamed = create(dtype=torch.float32, chunk_size=12)
    save_for_hf(streamed, str(tmp_path), safe_serialization=True)
    plain = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, chunk_size=0).eval()
    assert plain.chunk_size == 0 and streamed.state_dict().keys() == plain.state_dict().keys()
    images = batch(dtype=torch.float32)
    torch.testing.assert_close(streamed(images), plain(images))


@pytest.mark.parametrize('wrong', [-1, 'all', 2.5])
def test_wrong_chunk_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match="chunk_size must be 'auto', 0 or a number of tokens"):
        create(chunk_size=wrong)


def test_automatic_chunks_fit_into_cache_and_small_inputs_stay_whole():
    x = torch.empty(1, 65536, 192)
    chunk = auto_chunk_size(x, 768)
    assert 2**21 <= chunk * 768 * 4 <= 2**23
    assert auto_chunk_size(x.bfloat16(), 768) == 2 * chunk
    assert auto_chunk_size(x[:, :100], 768) == 0
    fused = cpu_kernels.supports(torch.float32)  # shorter sequences gain by its products
    assert auto_chunk_size(x[:, :2048], 768) == (chunk if fused else 0)


def test_automatic_chunks_in_training_begin_where_whole_blocks_would_keep_gibibytes(calls, monkeypatch):
    model, images = create(chunk_size='auto'), batch()
    exact = gradients(model, images)
    assert not calls
    kept = 24 * 3 * 48 * 32 * 8 * 3  # numbers × images × tokens × channels × bytes × blocks
    monkeypatch.setattr(chunk_size, 'KEPT_BYTES', kept + 1)
    gradients(model, images)
    assert not calls
    monkeypatch.setattr(chunk_size, 'KEPT_BYTES', kept)
    monkeypatch.setattr(chunk_size, 'chunk_tokens', lambda x, hidden: 24)
    torch.testing.assert_close(gradients(model, images), exact, rtol=1e-9, atol=1e-9)
    assert calls == [24] * 3


def test_on_a_gpu_only_the_blocks_that_do_not_fit_are_streamed(calls, monkeypatch):
    numbers, device = 48 * 32 * 3, torch.device('cuda')
    one, inputs = chunk_size.kept_bytes(numbers, 1, torch.bfloat16, device), 2 * numbers
    limit = 0
    monkeypatch.setattr(chunk_size, 'whole_bytes', lambda device: limit)
    for n in range(4):
        limit = n * one + (12 - n) * inputs  # what n whole and 12 - n streamed blocks keep
        assert chunk_size.whole_blocks(numbers, 12, torch.bfloat16, device) == n
    limit = 12 * one + 1
    assert chunk_size.whole_blocks(numbers, 12, torch.bfloat16, device) == 12
    limit = 1
    assert chunk_size.whole_blocks(numbers, 12, torch.bfloat16, device) == 0
    assert chunk_size.whole_blocks(numbers, 12, torch.bfloat16, torch.device('cpu')) == 0


def test_norms_over_all_tokens_keep_two_numbers_more_below_fp32():
    kept = {}
    for token_norm, dtype in itertools.product([False, True], [torch.float32, torch.bfloat16]):
        model = create(torch.float32, token_norm=token_norm, img_size=32, patch_size=1, proj_len=16, depth=1)
        (block,), sizes = model.blocks, {}
        x = torch.randn(1, 1024, 32, dtype=dtype, requires_grad=True)
        projection = model.projection_tensors(x, (32, 32))[0]

        def note(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autocast('cpu', dtype, dtype != torch.float32), torch.autograd.graph.saved_tensors_hooks(note, id):
            held = block(x, projection, (32, 32))
        kept[token_norm, dtype] = sum(sizes.values()) / (x.numel() * x.itemsize)
        assert held.shape == x.shape
    for dtype, more in ((torch.float32, 0), (torch.bfloat16, 2)):
        assert kept[True, dtype] - kept[False, dtype] == pytest.approx(more, abs=0.3)
        numbers, devices = 10**6, (torch.device('cpu'), torch.device('cuda'))
        for device in devices:
            counted = [chunk_size.kept_bytes(numbers, 2, dtype, device, norm) for norm in (False, True)]
            assert counted[1] - counted[0] == more * 2 * numbers * dtype.itemsize


def test_a_model_of_whole_and_streamed_blocks_has_the_gradients_of_either(calls, monkeypatch):
    model, images = create(chunk_size='auto'), batch()
    exact = gradients(model, images)
    monkeypatch.setattr('linvision.streaming.chunk_size.whole_blocks', lambda *args: 2)
    monkeypatch.setattr('linvision.streaming.chunk_size.chunk_tokens', lambda x, hidden: 24)
    torch.testing.assert_close(gradients(model, images), exact, rtol=1e-9, atol=1e-9)
    assert calls == [24]


def test_a_projection_learns_where_all_else_is_frozen():
    model = create(projection='linear')
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(('projection.', 'head.')))

    def gradient() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        model(batch()).square().sum().backward()
        return model.projection.weights[0].grad

    exact = gradient()
    model.set_chunk_size(12)
    assert exact.abs().max() > 0
    torch.testing.assert_close(gradient(), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('n', [1, 3])
def test_blocks_whose_output_has_another_dtype_than_their_input(n):
    """Under autocast a layer scale in fp32 makes fp32 of tokens in bf16."""
    model = create(dtype=torch.float32, init_values=0.5)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        plain = model(batch(n, dtype=torch.float32))
        for chunk in (24, 48):
            model.set_chunk_size(chunk)
            torch.testing.assert_close(model(batch(n, dtype=torch.float32)), plain, rtol=0.05, atol=0.05)
