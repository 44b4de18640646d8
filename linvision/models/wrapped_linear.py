"""Weight and bias of a linear layer that is wrapped, as by peft's adapters (LoRA, DoRA), or changed by hooks.

Attention reads the weight of `qkv` in parts and never calls it. A wrapper changes what the layer computes, not the
weight that it shows, and so do a hook (`torch.nn.utils.prune`) and a `forward` put in its place. So the layer is
asked: of a function f(x) = x Wᵀ + bᵀ the outputs of zero and of the identity are bᵀ and Wᵀ + bᵀ. One row more, of no
special form, tells a linear function from another. Gradients flow through the layer to the parameters of the wrapper.
It costs D + 2 rows a forward pass, where a block has thousands. A hook sees these rows, not tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REMEDY = 'Adapt attn.proj, mlp.fc1 and mlp.fc2 instead, or change the weight of attn.qkv by torch.nn.utils.parametrize.'


def weight_and_bias(layer: Any, dim: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Those of an `nn.Linear`, or of what wraps one; arguments and errors as of `wrapped_linear`."""
    hooks = layer._forward_pre_hooks or layer._forward_hooks or 'forward' in layer.__dict__
    if type(layer).forward is nn.Linear.forward and not (hooks and isinstance(like, Tensor)):
        return layer.weight, layer.bias
    return wrapped_linear(layer, dim, like)


def wrapped_linear(layer: nn.Module, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The weight, (C, D), and bias, (C), of whatever maps tokens linearly, with gradients.

    Args:
        layer: The layer; (n, D) -> (n, C).
        dim: Width D of the tokens.
        like: A tensor that gives the device, and the dtype where the layer has no parameters of floating point.

    Raises:
        TypeError: It is not linear.
    """
    for name, module in layer.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:  # before its weights leave zero
            raise TypeError(
                f'A wrapper of attn.qkv must be linear in the tokens, and {name} drops a share of {module.p} of them: '
                f'set its rate to 0 (lora_dropout of peft), or exclude qkv from it. {REMEDY}'
            )
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), like.dtype)
    zero = torch.zeros(1, dim, device=like.device, dtype=dtype)
    probe = torch.arange(1.0, dim + 1, device=like.device).cos().to(dtype).unsqueeze(0)  # draws no random numbers
    rows = torch.cat([zero, probe, torch.eye(dim, device=like.device, dtype=dtype)])
    with torch.autocast(like.device.type, enabled=False):  # rounding to bf16 would hide what is not linear
        out = layer(rows)
    bias, weight = out[0], (out[2:] - out[0]).T.contiguous()
    if not torch.compiler.is_compiling() and not out.is_meta:
        refuse_other(layer, probe, out[1:2], weight, bias)
    return weight, bias


@torch.no_grad()
def refuse_other(layer: nn.Module, probe: Tensor, found: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise TypeError where the layer's output of a row is not that of the weight and bias that it seems to have."""
    with torch.autocast(probe.device.type, enabled=False):
        error = (F.linear(probe, weight, bias) - found).float().norm()
    # rounding is of eps, and of 2^-11 where a GPU multiplies in TF32
    if not error <= 4 * torch.finfo(found.dtype).eps ** 0.5 * found.float().norm():
        raise TypeError(
            'attn.qkv must be an nn.Linear or a wrapper that is linear in the tokens: its weight is read in parts, '
            f'and that of {type(layer)} cannot be had. {REMEDY}'
        )
