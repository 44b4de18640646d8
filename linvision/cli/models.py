"""All registered models as a table: tokens, K, parameters and multiply-adds of one image.

    linvision models
    linvision models --output docs/models.md

Nothing is computed: the models are built, and their multiply-adds counted, on torch's meta device.
"""

from pathlib import Path
from typing import Any

import timm
import torch

import linvision  # noqa: F401  (registers the models)
from linvision.train.plan import multiply_adds

# where there are weights, a name's own channels and classes are those of their images
IMAGENET: dict[str, Any] = {'in_chans': 3, 'num_classes': 1000}
HEADER = """# Models

Names end in patch and image size. *Trunk* leaves out the projection and the positions; multiply-adds are those of one
image with 3 channels and 1,000 classes, counted by `torch.utils.flop_counter`, and beside them those of the
same model with full attention (`projection='none'`). Written by

    linvision models --output docs/models.md

| name | tokens | K | projection | width / depth / heads | parameters | trunk | multiply-adds | full attention |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def row(name: str) -> str:
    """The table's line of one model."""
    with torch.device('meta'):
        model: Any = timm.create_model(name, **IMAGENET)
        full: Any = timm.create_model(name, **IMAGENET, projection='none')
    count = {n: p.numel() for n, p in model.named_parameters()}
    trunk = sum(v for n, v in count.items() if not n.startswith(('projection.', 'position.', 'pos_embed')))
    heads = model.blocks[0].attn.num_heads
    kind = model.projection.kind.__name__.lower()
    own, whole = (f'{float(f"{multiply_adds(m) / 1e9:.3g}"):,g} G' for m in (model, full))  # three digits
    return (
        f'| `{name}` | {model.patch_embed.num_patches:,} | {model.projection.proj_len[0]} | {kind} | '
        f'{model.embed_dim} / {len(model.blocks)} / {heads} | {sum(count.values()):,} | {trunk:,} | '
        f'{own} | {whole} |'
    )


def key(name: str) -> tuple[int, int, int]:
    """Test model first, then by patch size, image size and width."""
    parts = name.split('_')
    if len(parts) < 5:
        return (0, 0, 0)
    return int(parts[3][5:]), int(parts[4]), ['pico', 'tiny', 'small', 'base', 'large'].index(parts[2])


def table() -> str:
    """The whole page."""
    names = sorted(timm.list_models('*linformer_vit*'), key=key)
    return HEADER + '\n'.join(row(name) for name in names) + '\n'


def main(output: Path | None = None) -> None:
    """Print the table.

    Args:
        output: A Markdown file to write instead.
    """
    if output is None:
        print(table(), end='')
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(table())
