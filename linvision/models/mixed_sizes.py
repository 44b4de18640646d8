"""Images of different sizes in one batch, in the form of timm's NaFlex: a dictionary of patches, places and validity.

E is made for one token grid and resized to another, so images of different sizes have different E. Here the images of
one size are put together again and run as a batch of their own: each gives to the bit what it gives alone or among its
like, whatever the projection, the positions and the chunks, and padding is not computed at all. What it costs is a pass
for each size: batches are best made of few sizes (`token_batches`), and of long sequences a pass is busy anyhow.

`patches` are (B, N, P · P · C) or (B, N, P, P, C), channels last, as timm's loader and collator make them; in
`patch_coord`, (B, N, 2), are rows and columns, and `patch_valid`, (B, N), is true for what is not padding. Under DDP
processes may have different sizes; under FSDP each size gathers the weights, so that all need as many sizes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from timm.data import Patchify
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class MixedBatch(dict[str, Tensor]):
    """A batch in timm's NaFlex form, which can be moved and divided as a tensor of images can."""

    @property
    def device(self) -> torch.device:
        """Where the patches are."""
        return self['patches'].device

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The batch on a device."""
        return type(self)({name: entry.to(device, non_blocking=non_blocking) for name, entry in self.items()})

    def chunk(self, parts: int) -> list[Self]:
        """The images in so many parts, as `Tensor.chunk` divides them."""
        entries = zip(*(entry.chunk(parts) for entry in self.values()), strict=True)
        return [type(self)(zip(self, part, strict=True)) for part in entries]


def images_by_size(batch: Mapping[str, Any], patch: tuple[int, int], in_chans: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of a batch, those of one size together.

    Args:
        batch: In timm's NaFlex form.
        patch: Patch size, (height, width).
        in_chans: Channels C.

    Yields:
        Which images of the batch they are, (b), and the images, (b, C, height, width).

    Raises:
        ValueError: Entries are missing or do not fit, or an image has not every token of its grid.
    """
    missing = {'patches', 'patch_coord', 'patch_valid'} - set(batch)
    if missing:
        raise ValueError(
            f'A batch of different sizes needs patches, patch_coord and patch_valid; {missing} are missing.'
        )
    patches, coord, valid = batch['patches'].flatten(2), batch['patch_coord'], batch['patch_valid'].bool()
    width = patch[0] * patch[1] * in_chans
    if patches.shape[2] != width or coord.shape != (*valid.shape, 2) or valid.shape != patches.shape[:2]:
        raise ValueError(
            f'Patches must be (B, N, {width}), channels last, with places (B, N, 2) and validity (B, N), got '
            f'{list(batch["patches"].shape)}, {list(coord.shape)} and {list(valid.shape)}.'
        )
    grids = coord.masked_fill(~valid.unsqueeze(-1), -1).amax(1) + 1  # (B, 2)
    sizes = [(h, w, n) for (h, w), n in zip(grids.tolist(), valid.sum(1).tolist(), strict=True)]
    for h, w, n in dict.fromkeys(sizes):
        if n == 0 or n != h * w:
            raise ValueError(
                f'E needs every token of the grid: an image has {n} of the {h} × {w} that its places span.'
            )
        which = torch.tensor([i for i, size in enumerate(sizes) if size == (h, w, n)], device=patches.device)
        inside = valid[which]
        place = (coord[which][..., 0] * w + coord[which][..., 1])[inside].unflatten(0, (-1, n))  # (b, n)
        order = place.argsort(1)
        if not torch.equal(place.gather(1, order), torch.arange(n, device=place.device).expand_as(place)):
            raise ValueError(f'E needs every token of the grid: an image of {h} × {w} tokens has one of them twice.')
        tokens = patches[which][inside].unflatten(0, (-1, n)).gather(1, order.unsqueeze(-1).expand(-1, -1, width))
        images = tokens.unflatten(2, (*patch, in_chans)).unflatten(1, (h, w))  # (b, h, w, P, P, C)
        yield which, images.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def runs_by_size(model: Any, batch: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """What a model is to run of a batch: see `images_by_size`.

    Raises:
        ValueError: The model has one size; or as `images_by_size`.
    """
    if not model.dynamic_img_size:
        raise ValueError(
            'Images of different sizes need a model made with dynamic_img_size=True; this one has one size.'
        )
    return images_by_size(batch, model.patch_embed.patch_size, model.in_chans)


def pooled_features(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The pooled features of every image of a batch, in its order: (B, D).

    Raises:
        ValueError: The model does not pool; or as `runs_by_size`.
    """
    if not model.global_pool:
        raise ValueError("Images of different sizes have different numbers of tokens: global_pool must not be ''.")
    parts = list(runs_by_size(model, batch))
    pooled = torch.cat([model.fc_norm(model.pool(model.forward_features(images))) for _, images in parts])
    return pooled[torch.cat([which for which, _ in parts]).argsort()]


def token_features(model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What timm's naflexvit gives as features: every token where it stands in the batch, and zeros for padding.

    Returns:
        `patches`, the normalised tokens, (B, P + N, D), and `patch_valid`, (B, N).

    Raises:
        ValueError: As `runs_by_size`, or tokens are dropped at random, so that they have no place.
    """
    parts = [(which, model.forward_features(images)) for which, images in runs_by_size(model, batch)]
    return {'patches': placed(batch, parts, model.num_prefix_tokens), 'patch_valid': batch['patch_valid']}


def token_intermediates(
    model: Any,
    batch: Mapping[str, Any],
    output_fmt: str,
    intermediates_only: bool,
    output_dict: bool,
    return_prefix_tokens: bool,
    **arguments: Any,
) -> Any:
    """Intermediates as timm's naflexvit gives them: tokens, (B, N, D), with zeros for padding; `arguments` are timm's.

    Raises:
        ValueError: Maps are asked for, which images of different sizes do not share; or as `token_features`.
    """
    if output_fmt != 'NLC':
        raise ValueError(
            f"Images of different sizes have no maps of one shape: say output_fmt='NLC', got {output_fmt!r}, and find "
            'the place of a token in patch_coord.'
        )
    P, runs = model.num_prefix_tokens, list(runs_by_size(model, batch))
    which = [part for part, _ in runs]
    found = [
        model.forward_intermediates(
            images, output_fmt='NLC', output_dict=True, return_prefix_tokens=True, intermediates_only=False, **arguments
        )
        for _, images in runs
    ]

    def together(name: str, prefix: int) -> list[Tensor]:
        layers = zip(*(each[name] for each in found), strict=True)
        return [placed(batch, list(zip(which, layer, strict=True)), prefix) for layer in layers]

    result: dict[str, Any] = {'image_intermediates': together('image_intermediates', 0)}
    if P and return_prefix_tokens:
        order = torch.cat(which).argsort()
        layers = zip(*(each['image_intermediates_prefix'] for each in found), strict=True)
        result['image_intermediates_prefix'] = [torch.cat(layer)[order] for layer in layers]
    result['patch_valid'] = batch['patch_valid']
    if not intermediates_only:
        finals = [(part, each['image_features']) for part, each in zip(which, found, strict=True)]
        result['image_features'] = placed(batch, finals, P)
    if output_dict:
        return result
    maps = result['image_intermediates']
    if 'image_intermediates_prefix' in result:
        maps = list(zip(maps, result['image_intermediates_prefix'], strict=True))
    return maps if intermediates_only else (result['image_features'], maps)


def placed(batch: Mapping[str, Any], parts: Sequence[tuple[Tensor, Tensor]], prefix: int) -> Tensor:
    """Tokens of every image, by size and in the order of its grid, where they stand in the batch: (B, prefix + N, D).

    Raises:
        ValueError: There are fewer than the grid has.
    """
    coord, valid = batch['patch_coord'], batch['patch_valid'].bool()
    out = parts[0][1].new_zeros(len(valid), prefix + valid.shape[1], parts[0][1].shape[2])
    for which, tokens in parts:
        inside = valid[which]
        if tokens.shape[1] != prefix + int(inside[0].sum()):
            raise ValueError('Dropped tokens have no place: in training patch_drop_rate must be 0 for features.')
        width = coord[which][..., 1].masked_fill(~inside, 0).amax() + 1
        place = (coord[which][..., 0] * width + coord[which][..., 1]).masked_fill(~inside, 0)  # (b, N)
        own = tokens[:, prefix:].gather(1, place.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
        out[which] = torch.cat([tokens[:, :prefix], own.masked_fill(~inside.unsqueeze(-1), 0.0)], dim=1)
    return out


def refuse_padding(key_padding_mask: Any) -> None:
    """Raise ValueError for a padding mask beside a batch that says itself what is padding."""
    if key_padding_mask is not None:
        raise ValueError('A batch of different sizes says by patch_valid what is padding: give no key_padding_mask.')


def collate(samples: Sequence[tuple[Tensor, int]], patch_size: tuple[int, int]) -> tuple[MixedBatch, Tensor]:
    """Images of different sizes and their labels as one batch in timm's NaFlex form, as long as its longest image.

    timm's own collator pads to a length that is fixed, and makes float32 of uint8.

    Args:
        samples: Images, (C, height, width), whose sides are multiples of the patch size, and labels.
        patch_size: Patch size, (height, width).

    Raises:
        ValueError: The sides of an image are no multiples.
    """
    for image, _ in samples:
        if image.shape[1] % patch_size[0] or image.shape[2] % patch_size[1]:
            raise ValueError(f'Sides must be multiples of the patch size {patch_size}, got {list(image.shape[1:])}.')
    patchify = Patchify(patch_size)
    images = [patchify(image.contiguous()) for image, _ in samples]
    batch = {name: pad_sequence([image[name] for image in images], batch_first=True) for name in images[0]}
    return MixedBatch(batch), torch.tensor([label for _, label in samples])


def token_batches(grids: Sequence[tuple[int, int]], budget: int) -> list[list[int]]:
    """Batches of images, each of at most so many tokens, those of one size together.

    Args:
        grids: Token grid of each image.
        budget: Tokens in a batch; an image that has more is a batch of its own.

    Returns:
        The indices of the images of each batch; every image is in one.
    """
    batches: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(grids)), key=lambda i: (grids[i][0] * grids[i][1], grids[i], i)):
        own = grids[i][0] * grids[i][1]
        if not batches or tokens + own > budget:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += own
    return batches


def padding_share(batch: Mapping[str, Any]) -> float:
    """Which share of a batch's patches is padding: memory of the batch that no model computes."""
    return 1.0 - float(batch['patch_valid'].float().mean())
