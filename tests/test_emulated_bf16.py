"""Where a processor only emulates bf16, a model in bf16 computes in fp32."""

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from linvision.train.parallel import Processes
from linvision.train.precision import choose_precision


class Dtypes(TorchDispatchMode):
    """Collects the dtypes that products and convolutions are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ('mm', 'linear', 'convolution')):
            self.seen |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.fixture
def processor(monkeypatch):
    """Says what the processor multiplies in bf16 with."""
    return lambda *names: monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict.fromkeys(names, True))


def create() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model('test_linformer_vit', num_classes=5, class_token=True, global_pool='token')


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('method', ['forward', 'forward_features'])
@pytest.mark.parametrize('chunk_size', [0, 32])
@pytest.mark.parametrize('autocast', [False, True])
def test_a_model_computes_in_fp32_and_answers_in_bf16(method, chunk_size, autocast, processor):
    processor('avx2')
    model = create().eval()
    model.set_chunk_size(chunk_size)
    x = images()
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    exact = create().eval()
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=autocast), Dtypes() as dtypes:
        found = getattr(model, method)(x)
    with torch.no_grad():
        wanted = getattr(exact, method)(x.float())
    assert dtypes.seen == {torch.float32}
    torch.testing.assert_close(found, wanted.bfloat16(), rtol=1e-2, atol=1e-5)


def test_weights_in_bf16_get_the_gradients_of_fp32(processor):
    processor('avx2')
    model, exact = create().bfloat16(), create()
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    model(images().bfloat16()).sum().backward()
    exact(images().bfloat16().float()).sum().backward()
    for found, wanted in zip(model.parameters(), exact.parameters(), strict=True):
        if wanted.grad is not None:
            assert found.grad is not None and found.grad.dtype == torch.bfloat16
            torch.testing.assert_close(found.grad.float(), wanted.grad, rtol=2e-2, atol=1e-2 * wanted.grad.abs().max())


@pytest.mark.parametrize('autocast', [False, True])
def test_checkpointed_blocks_find_weights_in_bf16_again(autocast, processor):
    x = images() if autocast else images().bfloat16()
    gradients = []
    for name, checkpointed in (('avx512_bf16', False), ('avx2', True)):
        processor(name)
        model = create().bfloat16()
        model.set_grad_checkpointing(checkpointed)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            loss = model(x).sum()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_hooks_run_once_and_a_processor_with_bf16_uses_it(processor):
    processor('avx512_bf16')
    model, calls = create().bfloat16(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), Dtypes() as dtypes:
        model(images().bfloat16())
        assert torch.bfloat16 in dtypes.seen
        processor('avx2')
        model(images().bfloat16())
    assert len(calls) == 2


def test_a_run_in_bf16_computes_in_fp32_and_says_so(processor):
    processor('avx2')
    precision, why = choose_precision('bf16', Processes(torch.device('cpu')))
    assert precision == 'fp32' and 'no instructions for bf16' in why and 'in place of bf16' in why
