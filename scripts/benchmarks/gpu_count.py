"""What a training step would move, keep and launch on a GPU, counted without one: a model, never a measurement.

    python -m scripts.benchmarks.gpu_count                                          # the table of docs/gpu_count.md
    python -m scripts.benchmarks.gpu_count --model linformer_vit_tiny_patch1_128 --top 15

One forward and backward pass of 8 images in bf16 autocast runs on fake CUDA tensors (torch's `FakeTensorMode`), which
have shapes and no values. Each kernel is charged the larger of its bytes at 3.0 TB/s and its FLOPs at 700 TFLOP/s (55
in fp32), 2 microseconds at least; launches are counted beside that, at 6 microseconds. Linux, a CUDA build of torch and
g++ are needed: `gpu_guard.cpp` stands in for the driver.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import linvision  # noqa: F401  (registers the models)
from linvision.guard import guarded

CARD = 80 * 2**30  # bytes of the card
BYTES_PER_S, LAUNCH_S, LEAST_S = 3.0e12, 6e-6, 2e-6
FLOPS_PER_S, FLOPS_FP32, FLOPS_CONV = 700e12, 55e12, 1e15
VIT = {'patch_size': 1, 'class_token': False, 'global_pool': 'avg'}  # a plain ViT of the same tokens


def pretend() -> None:
    """Make torch believe in a card of 80 GiB.

    Raises:
        ValueError: On another system than Linux.
    """
    if sys.platform != 'linux':
        raise ValueError(f'The stand-in for the driver is for Linux, got {sys.platform}.')
    root, library = Path(torch.__file__).parent, Path(tempfile.mkdtemp()) / 'gpu_guard.so'
    includes = [f'-I{root}/include', f'-I{root}/include/torch/csrc/api/include']
    libraries = [f'-L{root}/lib', '-lc10', '-ltorch_cpu', f'-Wl,-rpath,{root}/lib']
    source = str(Path(__file__).with_name('gpu_guard.cpp'))
    subprocess.run(
        ['g++', '-std=c++20', '-shared', '-fPIC', *includes, source, '-o', str(library), *libraries], check=True
    )
    patches: dict[Any, dict[str, Any]] = {
        torch._C: {'_ensureCUDADeviceGuardSet': lambda: None},
        torch.cuda.amp.common: {'amp_definitely_not_available': lambda: False},
        torch.cuda: {
            'is_bf16_supported': lambda *args, **kwargs: True,
            'mem_get_info': lambda *args, **kwargs: (CARD - 2**30, CARD),
            'memory_reserved': lambda *args, **kwargs: 0,
            'memory_allocated': lambda *args, **kwargs: 0,
            'get_device_capability': lambda *args, **kwargs: (9, 0),
            'get_device_properties': lambda *args, **kwargs: SimpleNamespace(
                total_memory=CARD, major=9, minor=0, multi_processor_count=132, name='none: a count'
            ),
        },
        F: {'scaled_dot_product_attention': attention},
    }
    for owner, changes in patches.items():
        for name, value in changes.items():
            setattr(owner, name, value)
    guard = ctypes.CDLL(str(library))
    guard.install_guard()
    guard.no_context()
    torch.autograd.set_multithreading_enabled(False)
    torch.set_num_threads(1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """The operator that PyTorch would choose on such a card: cuDNN's below fp32."""
    if torch.is_autocast_enabled('cuda'):
        q, k, v = (t.to(torch.get_autocast_dtype('cuda')) for t in (q, k, v))
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float('-inf'))
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    with torch.autocast('cuda', enabled=False):
        if q.dtype in (torch.bfloat16, torch.float16):
            cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
            return cudnn(q, k, v, attn_mask, learns, dropout_p, is_causal, False)[0]
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, learns, dropout_p, False)[0]


class Cost(TorchDispatchMode):
    """Kernels, bytes, FLOPs and modelled seconds by operation, and what should not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), str(func).replace('aten.', '')
        ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if '_local_scalar_dense' in name:
            self.flags['waits for the device: ' + name] += 1
        if any(t.dtype == torch.float64 for t in outs):
            self.flags['float64: ' + name] += 1
        if launches(func, name, ins, outs):
            self.charge(func, name, ins, outs, args, kwargs, out)
        return out

    def charge(
        self, func: Any, name: str, ins: list[Tensor], outs: list[Tensor], args: Any, kwargs: Any, out: Any
    ) -> None:
        """Count an operation."""
        moved = sum(touched_bytes(t) for t in {id(t): t for t in ins}.values()) + sum(map(touched_bytes, outs))
        flops, peak = 0, FLOPS_PER_S if ins and ins[0].dtype in (torch.bfloat16, torch.float16) else FLOPS_FP32
        back = 'backward' in name
        if 'scaled_dot_product' in name:
            q, k, v = args[1:4] if back else args[:3]
            B, H, N, d = q.shape
            flops = int((2.5 if back else 1) * 2 * B * H * N * k.shape[2] * (d + v.shape[3]))
        elif 'convolution' in name:
            peak = FLOPS_CONV
            flops = 2 * (args[0] if back else out).numel() * (args[2] if back else args[1])[0].numel() * (1 + back)
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        kernels = {'native_layer_norm_backward.default': 3, 'convolution_backward.default': 2}.get(name, 1)
        self.kernels[name] += kernels
        self.bytes[name] += moved
        self.flops[name] += flops
        self.seconds[name] += max(moved / BYTES_PER_S, flops / peak, LEAST_S * kernels)


def launches(func: Any, name: str, ins: list[Tensor], outs: list[Tensor]) -> bool:
    """Whether an operation runs a kernel on the card: no view, and no new array without values."""
    silent = ('_unsafe_view', 'detach', 'lift_fresh', 'alias', '_reshape_alias', 'empty', 'new_empty', 'prim.')
    if name.startswith(silent) or any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
        return False
    return any(t.device.type == 'cuda' for t in ins + outs) and any(t.numel() for t in outs)


def touched_bytes(t: Tensor) -> int:
    """Bytes of a tensor's numbers, those of an expanded axis once."""
    n = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        n *= size if stride else 1
    return n * t.element_size()


def count(name: str, img_size: int, batch: int = 8, **arguments: Any) -> dict[str, Any]:
    """Count one forward and backward pass of a model in bf16 autocast; `pretend` must have been called.

    Returns:
        Kernels, GiB moved, GiB kept between the passes, TFLOP, modelled milliseconds, milliseconds of launches, flags,
        and the `Cost` as 'cost'.
    """
    with torch.device('meta'):
        model = timm.create_model(name, img_size=img_size, **arguments).train()
    kept: dict[int, tuple[Any, int]] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            storage = t.untyped_storage()
            kept[id(storage)] = storage, storage.nbytes()  # held, so that no other gets its identity
        return t

    with FakeTensorMode():
        for module in model.modules():  # `to_empty` would read the tensors that are not fake
            for key, value in module.named_parameters(recurse=False):
                setattr(module, key, nn.Parameter(torch.empty(value.shape, device='cuda'), value.requires_grad))
            for key, value in module.named_buffers(recurse=False):
                setattr(module, key, torch.empty(value.shape, dtype=value.dtype, device='cuda'))
        images = torch.randn(batch, model.patch_embed.proj.in_channels, img_size, img_size, device='cuda')
        labels = torch.zeros(batch, dtype=torch.long, device='cuda')
        with Cost() as cost:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast('cuda', torch.bfloat16):
                loss = F.cross_entropy(model(images).float(), labels)
            loss.backward()
    kernels = cost.kernels.total()
    return {
        'kernels': kernels,
        'moved_gib': cost.bytes.total() / 2**30,
        'kept_gib': sum(size for _, size in kept.values()) / 2**30,
        'tflop': cost.flops.total() / 1e12,
        'modelled_ms': 1e3 * cost.seconds.total(),
        'launch_ms': 1e3 * LAUNCH_S * kernels,
        'flags': dict(cost.flags),
        'cost': cost,
    }


def table() -> list[dict[str, Any]]:
    """Tiny and small from 1,024 to 65,536 tokens: as `auto` runs them, whole, and a plain ViT."""
    rows = []
    for size in (32, 64, 128, 256):
        for width in ('tiny', 'small'):
            name, ours = f'linformer_vit_{width}_patch1_{size}', {'proj_len': 64 if size == 32 else 256}
            cases = {'auto': (name, ours), 'whole': (name, {**ours, 'chunk_size': 0})}
            cases["timm's ViT"] = (f'vit_{width}_patch16_224', VIT)
            for how, (model, arguments) in cases.items():
                rows.append({'width': width, 'tokens': size**2, 'how': how, **count(model, size, **arguments)})
                print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    flags = '; '.join(f'{n} {flag}' for flag, n in row['flags'].items())
    return (
        f'| {row["width"]}, {row["tokens"]:,} | {row["how"]} | {row["kernels"]:,} | {row["moved_gib"]:.1f} | '
        f'{row["kept_gib"]:.2f} | {row["modelled_ms"]:.1f} | {row["launch_ms"]:.1f} | {flags}'
    )


def main(
    model: str = '', batch: int = 8, args: tyro.conf.UseAppendAction[dict[str, int | str]] | None = None, top: int = 0
) -> None:
    """Count.

    Args:
        model: A model's name, at the size of its name; without one, the table.
        batch: Images.
        args: The model's arguments, as in `--args proj_len 256`.
        top: How many operations to list, the dearest first.
    """
    pretend()
    if not model:
        print('| | | kernels | GiB moved | GiB kept | modelled ms | ms to launch |\n|' + ' --- |' * 7)
        table()
        return
    size = timm.get_pretrained_cfg(model).input_size[-1]
    row = {'width': model, 'tokens': '', 'how': json.dumps(args or {}), **count(model, size, batch, **(args or {}))}
    cost = row['cost']
    print({k: v for k, v in row.items() if k != 'cost'})
    for name, seconds in cost.seconds.most_common(top):
        share = seconds / cost.seconds.total()
        moved = cost.bytes[name] / 2**30
        print(f'{name:50.50} {cost.kernels[name]:5d} {moved:8.2f} GiB {1e3 * seconds:7.2f} ms {share:4.0%}')


if __name__ == '__main__':
    with guarded():
        tyro.cli(main, description=__doc__)
