"""Whoever looks into a model, or changes a part of it, gets what blocks that run whole give; at lengths that stream."""

import threading

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.parallel.replicate import replicate
from torch.utils.flop_counter import FlopCounterMode

from linvision.convert import fit_projection, from_vit
from linvision.reweighted import reweighted
from linvision.streaming import cpu_kernels

SIZE = 48  # 2,304 tokens: from 2,048 on blocks stream on CPUs


def pico(size: int = SIZE, **arguments) -> nn.Module:
    torch.manual_seed(0)
    shape = {'img_size': size, 'proj_len': 16, 'depth': 2, 'num_classes': 5}
    return timm.create_model('linformer_vit_pico_patch1_32.untrained', **{**shape, **arguments})


def images(size: int = SIZE, count: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def whole(model: nn.Module, x: Tensor) -> Tensor:
    model.set_chunk_size(0)
    out = model(x)
    model.set_chunk_size('auto')
    return out


class Doubled(timm.layers.Mlp):
    """An MLP of the same parts that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize('part', ['mlp', 'mlp.fc1', 'attn', 'attn.proj', 'attn.qkv', 'norm2'])
@torch.no_grad()
def test_a_forward_that_takes_the_place_of_a_parts_own_is_what_counts(part):
    model, x = pico().eval(), images()
    plain = model(x)
    module = model.blocks[1].get_submodule(part)
    forward = module.forward
    module.forward = lambda *args: 1.5 * forward(*args)
    out = model(x)
    assert (out - plain).norm() > 1e-3 * plain.norm()
    torch.testing.assert_close(out, whole(model, x))


@torch.no_grad()
def test_an_mlp_of_another_class_is_what_counts():
    model, x = pico(mlp_layer=Doubled).eval(), images()
    torch.testing.assert_close(model(x), whole(model, x))


@torch.no_grad()
def test_a_hook_on_qkv_is_called_and_its_result_counts():
    model, x = pico().eval(), images()
    plain, seen = model(x), []
    model.blocks[1].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out.shape) or 1.5 * out)
    assert (model(x) - plain).norm() > 1e-3 * plain.norm() and seen[0][-1] == 3 * model.embed_dim


def test_backward_hooks_and_hooks_on_all_modules_are_called_at_every_length():
    called = []
    for size in (16, 2 * SIZE):
        model, fired = pico(size), []
        for name, module in model.blocks.named_modules():
            if name.endswith(('fc1', 'act', 'proj')):
                module.register_full_backward_hook(lambda *args, name=name, fired=fired: fired.append(name))
        model(images(size)).sum().backward()
        called.append(sorted(fired))
    assert called[0] == called[1] and len(called[0]) == 6
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(type(module).__name__))
    with torch.no_grad():
        pico().eval()(images())
    handle.remove()
    assert seen.count('Mlp') == seen.count('LinformerAttention') == 2


@torch.no_grad()
def test_floating_point_operations_are_counted_in_chunks_too():
    model, counts = pico().eval(), []
    for chunk_size in ('auto', 0):
        model.set_chunk_size(chunk_size)
        with FlopCounterMode(display=False) as counter:
            model(images())
        counts.append(counter.get_total_flops())
    assert counts[0] == pytest.approx(counts[1], rel=0.05)


@pytest.mark.parametrize('token_norm', [False, True])
@pytest.mark.parametrize('drop', [nn.Dropout1d, nn.functional.dropout])
def test_an_mlp_may_drop_as_it_likes_and_streams_with_its_own_gradient(drop, token_norm):
    class Dropping(timm.layers.Mlp):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.own = drop(0.5) if isinstance(drop, type) else lambda x: drop(x, 0.5, self.training)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.own(self.act(self.fc1(x))))

    model = pico(16, mlp_layer=Dropping, chunk_size=64, token_norm=token_norm).double().train()
    weight = model.blocks[0].mlp.fc1.weight
    x, direction = images(16).double(), torch.randn_like(weight)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return model(x).square().sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    values = []
    with torch.no_grad():  # in training mode and with gradients off, blocks draw in the same order
        for step in (1e-6, -2e-6):
            weight += step * direction
            with torch.enable_grad():
                values.append(loss().item())
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore:.*torch.jit.trace:DeprecationWarning')
@pytest.mark.parametrize('learns', [False, True])
def test_a_model_of_this_length_compiles_in_one_graph_and_is_traced(learns):
    model, x = pico().train(learns), images()
    torch._dynamo.reset()
    with torch.set_grad_enabled(learns):
        found = torch._dynamo.explain(model)(x)
        assert (found.graph_count, found.graph_break_count) == (1, 0)
        traced = torch.jit.trace(model.eval(), x)
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.skipif(not cpu_kernels.supports(torch.float32), reason='this PyTorch has no oneDNN')
@pytest.mark.parametrize('frozen', ['fc1', 'fc2', 'fc1.weight', 'fc2.bias'])
def test_frozen_layers_of_an_mlp_get_no_gradient_and_the_others_theirs(frozen):
    found = []
    for size in (16, SIZE):  # plain products, and oneDNN's
        x = images(SIZE)[..., :size, :size].flatten(2).mT @ torch.eye(3, 64)
        model = pico()
        mlp = model.blocks[0].mlp
        for name, parameter in mlp.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        for fused in (True, False):
            mlp.fused = fused
            mlp.zero_grad(set_to_none=True)
            mlp(x).square().sum().backward()
            found.append({name: p.grad for name, p in mlp.named_parameters()})
        ours, plain = found[-2:]
        assert {n for n, g in ours.items() if g is None} == {n for n, g in plain.items() if g is None} != set()
        for name, gradient in plain.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)


def test_threads_that_train_one_model_leave_it_its_parameters():
    model, errors = pico(16, chunk_size=64), []
    before = {name: id(p) for name, p in model.named_parameters()}

    def train() -> None:
        try:
            for _ in range(4):
                model(images(16)).sum().backward()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and {name: id(p) for name, p in model.named_parameters()} == before


def test_a_module_with_other_weights_leaves_the_module_alone_and_replaces_tied_ones_everywhere():
    tied = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).eval()
    tied[2].weight = tied[0].weight
    x, other = torch.randn(2, 3), torch.randn(3, 3)
    before = tied(x)
    wanted = torch.func.functional_call(tied, {'0.weight': other}, (x,))
    torch.testing.assert_close(reweighted(tied, {'0.weight': other})(x), wanted)
    assert torch.equal(tied(x), before) and tied[2].weight is tied[0].weight


@pytest.mark.skipif(not torch.cuda.is_available(), reason='replicas are made on GPUs')
def test_a_replica_of_data_parallel_has_gradients():
    model = pico(16, chunk_size=64).cuda()
    (replica,) = replicate(model, [0])
    replica(images(16).cuda()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_indices_of_blocks_may_be_a_range():
    model, x = pico(16).eval(), images(16)
    wanted = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    found = model.forward_intermediates(x, indices=range(2), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert len(model.get_intermediate_layers(x, n=range(1, 2))) == 1


def test_e_is_fitted_without_dropout_and_the_model_keeps_its_mode():
    torch.manual_seed(0)
    shape = {'img_size': 32, 'patch_size': 4, 'attn_drop_rate': 0.3, 'proj_drop_rate': 0.3}
    original = timm.create_model('test_vit', **shape).train()
    model = from_vit(original, proj_len=4).train()
    x = images(32, 8)
    errors = fit_projection(model, original, [x], steps=1)
    again = from_vit(original.eval(), proj_len=4).eval()
    assert errors == fit_projection(again, original, [x], steps=1) and model.training
