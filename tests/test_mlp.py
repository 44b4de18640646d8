"""The MLP of a block that learns on a CPU equals timm's."""

import pytest
import timm.layers
import torch
from torch import nn

from linvision.models.mlp import Mlp
from linvision.streaming import cpu_kernels

pytestmark = pytest.mark.skipif(not cpu_kernels.supports(torch.float32), reason='this PyTorch has no oneDNN')


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of what `learning_mlp` was given."""
    seen, plain = [], cpu_kernels.learning_mlp
    monkeypatch.setattr(cpu_kernels, 'learning_mlp', lambda mlp, x: seen.append(tuple(x.shape)) or plain(mlp, x))
    monkeypatch.setattr(cpu_kernels, 'FUSED_TOKENS', 12)
    return seen


def create(**kwargs) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's, with the same weights."""
    ours, timms = (make(8, 32, **kwargs).train() for make in (Mlp, timm.layers.Mlp))
    torch.manual_seed(0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    timms.load_state_dict(ours.state_dict())
    return ours, timms


def gradients(mlp: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and all gradients, those of a loss with uneven weights."""
    x = x.clone().requires_grad_()
    y = mlp(x)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.transpose(0, 1).shape).transpose(0, 1)  # not contiguous
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *mlp.parameters()])]


@pytest.mark.parametrize(
    'kwargs', [{}, {'bias': False}, {'act_layer': lambda: nn.GELU(approximate='tanh')}], ids=['gelu', 'no bias', 'tanh']
)
def test_output_and_gradients_equal_timms(kwargs, calls):
    ours, timms = create(**kwargs)
    x = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1))
    for found, wanted in zip(gradients(ours, x), gradients(timms, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert calls == [(3, 7, 8)]


def test_frozen_weights_get_no_gradient(calls):
    ours, _ = create()
    ours.fc1.requires_grad_(False)
    ours(torch.randn(3, 7, 8)).sum().backward()
    assert ours.fc1.weight.grad is None and ours.fc2.weight.grad is not None and calls


STEPS_ASIDE = {
    'double': lambda mlp, x: mlp.double()(x.double()),
    'few tokens': lambda mlp, x: mlp(x[:1, :3]),
    'no gradients': lambda mlp, x: torch.no_grad()(mlp)(x),
    'autocast': lambda mlp, x: torch.autocast('cpu', torch.bfloat16)(mlp)(x),
    'a hook': lambda mlp, x: (mlp.fc1.register_forward_hook(lambda *_: None), mlp(x))[1],
    'torch.func': lambda mlp, x: torch.func.grad(lambda t: mlp(t).sum())(x),
    'a trace': lambda mlp, x: torch.fx.symbolic_trace(mlp)(x),
    'dropout': lambda mlp, x: (setattr(mlp.drop1, 'p', 0.5), mlp(x))[1],
    'another activation': lambda mlp, x: (setattr(mlp, 'act', nn.ReLU()), mlp(x))[1],
}


@pytest.mark.parametrize('case', STEPS_ASIDE)
def test_what_oneDNN_does_not_compute_is_left_to_timms_equation(case, calls):
    ours, timms = create()
    x = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    found = STEPS_ASIDE[case](ours, x)
    torch.manual_seed(2)
    torch.testing.assert_close(found, STEPS_ASIDE[case](timms, x), rtol=0, atol=0)
    assert not calls
