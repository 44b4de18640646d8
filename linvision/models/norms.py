"""Norms that timm does not have."""

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(timm.layers.LayerNorm):
    """timm's layer norm, in the dtype of autocast where that is on.

    Autocast gives layer norms fp32: the tokens are then read and written several times more, and cast again for each
    product that follows. The sums are in fp32 either way.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


@torch.fx.wrap
def layer_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm whose result has the dtype of autocast, where that is on."""
    if x.is_meta:  # a device that autocast does not know
        return F.layer_norm(x, shape, weight, bias, eps)
    return timm.layers.fast_layer_norm(x, shape, weight, bias, eps)  # type: ignore[arg-type]  # a list there


class TokenNorm(nn.Module):
    """Normalise each channel over the tokens of an image (instance norm): (B, P + N, D) -> (B, P + N, D).

    Layer norm makes all tokens equally large, each by itself. This keeps how much larger one is than the others of its
    image, and takes away what all have in common: what helps where a few bright tokens stand on an empty background.

    Args:
        dim: Width D of the tokens.
        eps: Added to the variance.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x.shape[0], int) and x.shape[0] == 0:  # no images: var_mean warns of no numbers
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # a sum of squares overflows in fp16
        centred = wide - wide.mean(1, keepdim=True)  # on a CPU a third of the time of torch.var_mean and what follows
        var = torch.linalg.vecdot(centred, centred, dim=1).unsqueeze(1) / x.shape[1]
        return torch.addcmul(self.bias, centred, torch.rsqrt(var + self.eps) * self.weight).to(x.dtype)
