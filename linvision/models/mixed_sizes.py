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
from typing import Any

import torch
from torch import Tensor


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


def pooled_features(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The pooled features of every image of a batch, in its order: (B, D).

    Raises:
        ValueError: The model has one size, or does not pool; or as `images_by_size`.
    """
    if not model.dynamic_img_size:
        raise ValueError(
            'Images of different sizes need a model made with dynamic_img_size=True; this one has one size.'
        )
    if not model.global_pool:
        raise ValueError("Images of different sizes have different numbers of tokens: global_pool must not be ''.")
    parts = list(images_by_size(batch, model.patch_embed.patch_size, model.in_chans))
    pooled = torch.cat([model.fc_norm(model.pool(model.forward_features(images))) for _, images in parts])
    return pooled[torch.cat([which for which, _ in parts]).argsort()]


def refuse_padding(key_padding_mask: Any) -> None:
    """Raise ValueError for a padding mask beside a batch that says itself what is padding."""
    if key_padding_mask is not None:
        raise ValueError('A batch of different sizes says by patch_valid what is padding: give no key_padding_mask.')


def collate(samples: Sequence[tuple[Tensor, int]], patch_size: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    """Images of different sizes and their labels as one batch in timm's NaFlex form.

    Args:
        samples: Images, (C, height, width), whose sides are multiples of the patch size, and labels.
        patch_size: Patch size, (height, width).

    Raises:
        ValueError: The sides of an image are no multiples.
    """
    dicts = []
    for image, _ in samples:
        if image.shape[1] % patch_size[0] or image.shape[2] % patch_size[1]:
            raise ValueError(f'Sides must be multiples of the patch size {patch_size}, got {list(image.shape[1:])}.')
        cells = image.unflatten(2, (-1, patch_size[1])).unflatten(1, (-1, patch_size[0]))  # (C, h, P, w, P)
        grid = torch.meshgrid(*(torch.arange(n) for n in (cells.shape[1], cells.shape[3])), indexing='ij')
        dicts.append((cells.permute(1, 3, 2, 4, 0).flatten(0, 1).flatten(1), torch.stack(grid, -1).flatten(0, 1)))
    longest = max(len(patches) for patches, _ in dicts)
    batch = {
        'patches': dicts[0][0].new_zeros(len(dicts), longest, dicts[0][0].shape[1]),
        'patch_coord': torch.zeros(len(dicts), longest, 2, dtype=torch.int64),
        'patch_valid': torch.zeros(len(dicts), longest, dtype=torch.bool),
    }
    for i, (patches, coord) in enumerate(dicts):
        n = len(patches)
        batch['patches'][i, :n], batch['patch_coord'][i, :n], batch['patch_valid'][i, :n] = patches, coord, True
    return batch, torch.tensor([label for _, label in samples])


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
