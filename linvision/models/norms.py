"""Norms that timm does not have."""

from collections.abc import Sequence

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linvision.models.band import Band


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
    """Normalise each channel over the tokens of an image (instance norm): (B, N, D) -> (B, N, D).

    Layer norm makes all tokens equally large, each by itself. This keeps how much larger one is than the others of its
    image, and takes away what all have in common. Padding counts for nothing, and becomes zero.

    Args:
        dim: Width D of the tokens.
        eps: Added to the variance.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.band: Band | None = None  # this process's part of the image, where several share it
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, valid: Tensor | None = None, statistics: Tensor | None = None) -> Tensor:
        """Normalise tokens.

        Args:
            x: Tokens, (B, N, D); any of them, where their image's statistics are given.
            valid: Which of them are not padding, (B, N), boolean; all by default.
            statistics: Mean and variance of each channel, (B, 2, D), as `statistics` gives them.
        """
        if statistics is None:
            wide = widened(x)
            sums = self.over_image(torch.cat([total(wide, valid), tokens_in(wide, valid)], dim=-1))  # in one exchange
            count = sums[..., -1:]
            centred = wide - sums[..., :-1] / count
            var = self.over_image(total(centred.square(), valid)) / count
        else:
            centred, var = widened(x) - statistics[:, :1], statistics[:, 1:]
        y = torch.addcmul(self.bias, centred, torch.rsqrt(var + self.eps) * self.weight).to(x.dtype)
        # where an image hardly varies, padding would grow from block to block
        return y if valid is None else y.masked_fill(~valid.unsqueeze(-1), 0.0)

    def over_image(self, x: Tensor) -> Tensor:
        """A sum over this process's tokens as that over all tokens of the image."""
        if torch.jit.is_scripting() or self.band is None:
            return x
        return self.band.sum(x)

    # --------------------------------------------------------------------------- from some of the tokens after others

    @torch.jit.unused
    @torch.no_grad()
    def statistics(self, parts: Sequence[tuple[Tensor, Tensor | None]], count: Tensor) -> Tensor:
        """Mean and variance of each channel: (B, 2, D).

        Args:
            parts: The tokens, (B, n, D), and which of them are not padding, (B, n) or None for all.
            count: How many tokens the image has, (B, 1, 1).
        """
        sums = [total(widened(x), valid) for x, valid in parts]
        mean = self.over_image(torch.stack(sums).sum(0)) / count
        sums = [total((widened(x) - mean).square(), valid) for x, valid in parts]
        return torch.cat([mean, self.over_image(torch.stack(sums).sum(0)) / count], dim=1)

    @torch.jit.unused
    @torch.no_grad()
    def through_statistics(
        self, x: Tensor, valid: Tensor | None, statistics: Tensor, grad: Tensor, count: Tensor
    ) -> Tensor:
        """The gradient that tokens get through `statistics`: (B, n, D).

        Args:
            x, valid: As a part in `statistics`.
            statistics: What it gave.
            grad: The gradient of that, over all processes.
            count: As for `statistics`.
        """
        dx = (grad[:, :1] + 2 * grad[:, 1:] * (widened(x) - statistics[:, :1])) / count
        return dx if valid is None else dx.masked_fill(~valid.unsqueeze(-1), 0.0)


def widened(x: Tensor) -> Tensor:
    """Tokens in fp32 at least: a sum of squares overflows in fp16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def total(x: Tensor, valid: Tensor | None) -> Tensor:
    """The sum over tokens that are not padding: (B, N, D) -> (B, 1, D)."""
    # not a product of matrices, which autocast narrows
    return (x if valid is None else x.masked_fill(~valid.unsqueeze(-1), 0.0)).sum(1, keepdim=True)


def tokens_in(x: Tensor, valid: Tensor | None) -> Tensor:
    """How many tokens are not padding: (B, 1, 1)."""
    if valid is None:
        return x.new_ones(x.shape[0], 1, 1) * x.shape[1]
    return valid.sum(1).view(-1, 1, 1).to(x.dtype)
