"""Norms that timm does not have."""

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
    """Normalise each channel over the tokens of an image (instance norm): (B, P + N, D) -> (B, P + N, D).

    Layer norm makes all tokens equally large, each by itself. This keeps how much larger one is than the others of its
    image, and takes away what all have in common. Mean and variance are those of the tokens on the grid, without
    padding; class and register tokens are normalised by them too.

    Args:
        dim: Width D of the tokens.
        num_prefix_tokens: P, tokens before those on the grid.
        eps: Added to the variance.
    """

    def __init__(
        self,
        dim: int,
        num_prefix_tokens: int = 0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens, self.eps = num_prefix_tokens, eps
        self.band: Band | None = None  # this process's part of the image, where several share it
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, valid: Tensor | None = None, statistics: Tensor | None = None) -> Tensor:
        """Normalise tokens.

        Args:
            x: Tokens, (B, P + N, D); any of them, where their image's statistics are given.
            valid: Which of them are not padding, (B, P + N), boolean; all by default.
            statistics: Mean and variance of each channel, (B, 2, D), as `statistics` gives them.
        """
        if isinstance(x.shape[0], int) and x.shape[0] == 0:  # no images: there is no mean of no numbers
            return x
        wide = self.wide(x)
        if statistics is None:
            centred = wide - self.mean(wide, valid)
            var = self.mean_square(centred, valid)
        else:
            centred = wide - statistics[:, :1]
            var = statistics[:, 1:]
        return torch.addcmul(self.bias, centred, torch.rsqrt(var + self.eps) * self.weight).to(x.dtype)

    @torch.jit.unused
    def statistics(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Mean and variance of each channel of an image: (B, P + N, D) -> (B, 2, D); arguments as of `forward`."""
        wide = self.wide(x)
        mean = self.mean(wide, valid)
        return torch.cat([mean, self.mean_square(wide - mean, valid)], dim=1)

    def wide(self, x: Tensor) -> Tensor:
        """Tokens in fp32 at least: a sum of squares overflows in fp16."""
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def mean(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Mean over the image: (B, P + N, D) -> (B, 1, D)."""
        return self.per_token(self.counted(x, valid).sum(1, keepdim=True), x, valid)

    def mean_square(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Mean of the squares over the image: (B, P + N, D) -> (B, 1, D)."""
        # not vecdot or a product of matrices, which autocast narrows
        return self.per_token(self.counted(x, valid).square().sum(1, keepdim=True), x, valid)

    def counted(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """The tokens on the grid, zero where there is padding."""
        if valid is not None:
            x = x.masked_fill(~valid.unsqueeze(-1), 0.0)
        return x[:, self.num_prefix_tokens :]

    def per_token(self, total: Tensor, x: Tensor, valid: Tensor | None) -> Tensor:
        """A sum over this process's tokens, (B, 1, D), as the mean over those of the image."""
        if torch.jit.is_scripting() or self.band is None:
            if valid is None:
                return total / (x.shape[1] - self.num_prefix_tokens)
            return total / valid[:, self.num_prefix_tokens :].sum(1).view(-1, 1, 1)
        if valid is None:
            count = total.new_full((x.shape[0], 1, 1), x.shape[1] - self.num_prefix_tokens)
        else:
            count = valid[:, self.num_prefix_tokens :].sum(1).view(-1, 1, 1).to(total.dtype)
        joined = self.band.sum(torch.cat([total, count], dim=-1))
        return joined[..., :-1] / joined[..., -1:]
