"""The registered models as a table: tokens, K and parameters; with a flag, multiply-adds of one image.

    linvision models
    linvision models 'pico*' '*_224' --multiply-adds
    linvision models --pretrained
    linvision models --output docs/models.md

`trunk` in the JSON is parameters without those of the projection and the positions. Nothing is computed: the models are
built, and their multiply-adds counted, on torch's meta device.
"""

import json
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import tyro

import linvision  # noqa: F401  (registers the models)
from linvision.meter import counted
from linvision.nearest import nearest

PREFIX = 'linformer_vit_'
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
COLUMNS = {  # of the plain table; what is as wide as its values stands beside
    'tokens': 7,
    'K': 4,
    'projection': 10,
    'width/depth/heads': 17,
    'parameters': 11,
    'multiply_adds': 13,
    'full_attention': 14,
}


def facts(name: str, multiply_adds: bool = False) -> dict[str, Any]:
    """What the tables say of one model; one with a tag has the channels and classes of its weights."""
    shape = {} if '.' in name else IMAGENET
    with torch.device('meta'):
        model: Any = timm.create_model(name, **shape, weight_init='skip')
    count = {n: p.numel() for n, p in model.named_parameters()}
    found = {
        'name': name,
        'tokens': model.patch_embed.num_patches,
        'K': model.projection.proj_len[0],
        'projection': model.projection.kind.__name__.lower(),
        'width': model.embed_dim,
        'depth': len(model.blocks),
        'heads': model.blocks[0].attn.num_heads,
        'parameters': sum(count.values()),
        'trunk': sum(v for n, v in count.items() if not n.startswith(('projection.', 'position.', 'pos_embed'))),
    }
    if multiply_adds:
        from linvision.train.plan import multiply_adds as multiply_adds_of

        with torch.device('meta'):
            full: Any = timm.create_model(name, **shape, projection='none', weight_init='skip')
        found |= {'multiply_adds': multiply_adds_of(model), 'full_attention': multiply_adds_of(full)}
    if '.' in name:
        found |= score(model.pretrained_cfg['file'])
    return found


def score(weights: str) -> dict[str, Any]:
    """What weights that come with the package were trained on, and their score."""
    metrics = json.loads(Path(weights).with_name('metrics.json').read_text())
    note = f' ({metrics["data_note"]})' if 'data_note' in metrics else ''
    return {'dataset': metrics['recipe']['dataset'] + note, 'top1': metrics['top1']}


def billions(number: float) -> str:
    """To three digits."""
    return f'{float(f"{number / 1e9:.3g}"):,g} G'


def markdown(found: dict[str, Any]) -> str:
    """A row of the page."""
    numbers = ' | '.join(f'{found[k]:,}' for k in ('parameters', 'trunk'))
    return (
        f'| `{found["name"]}` | {found["tokens"]:,} | {found["K"]} | {found["projection"]} | {found["width"]} / '
        f'{found["depth"]} / {found["heads"]} | {numbers} | {billions(found["multiply_adds"])} | '
        f'{billions(found["full_attention"])} |'
    )


def plain(names: list[str], rows: Iterable[dict[str, Any]], columns: Iterable[str]) -> Iterator[str]:
    """The table as aligned text, each row when it is known."""
    width = max(map(len, names))
    yield '  '.join(['name'.ljust(width), *(c.replace('_', '-').rjust(COLUMNS[c]) for c in columns)])
    for row in rows:
        texts = {k: f'{row[k]:,}' for k in ('tokens', 'K', 'parameters')} | {'projection': row['projection']}
        texts |= {k: billions(row[k]) for k in ('multiply_adds', 'full_attention') if k in row}
        texts['width/depth/heads'] = f'{row["width"]}/{row["depth"]}/{row["heads"]}'
        cells = [row['name'].ljust(width), *(texts[c].rjust(COLUMNS[c]) for c in columns)]
        yield '  '.join(cells) + (f'  {100 * row["top1"]:.2f} % on {row["dataset"]}' if 'top1' in row else '')


def key(name: str) -> tuple[int, int, int]:
    """Test model first, then by patch size, image size and width."""
    parts = name.partition('.')[0].split('_')
    if len(parts) < 5:
        return (0, 0, 0)
    return int(parts[3][5:]), int(parts[4]), ['pico', 'tiny', 'small', 'base', 'large'].index(parts[2])


def chosen(patterns: Iterable[str], pretrained: bool) -> list[str]:
    """The names that one of the patterns fits, with or without `linformer_vit_`; all where there is no pattern.

    Raises:
        ValueError: None does.
    """
    names = sorted(timm.list_models('*linformer_vit*', pretrained=pretrained), key=key)
    patterns = tuple(patterns) or ('*',)
    found = [n for n in names if any(fnmatchcase(n, p) or fnmatchcase(n, PREFIX + p) for p in patterns)]
    if not found:
        which = 'model with weights' if pretrained else 'model'
        near = nearest(which, ' '.join(patterns), [name.removeprefix(PREFIX) for name in names])
        raise ValueError(f"{near} A pattern is like 'pico*' or '*_224'.")
    return found


def main(
    patterns: tyro.conf.Positional[tuple[str, ...]] = (),
    pretrained: tyro.conf.FlagCreatePairsOff[bool] = False,
    multiply_adds: tyro.conf.FlagCreatePairsOff[bool] = False,
    as_json: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(name='json')] = False,
    output: Path | None = None,
) -> None:
    """Print the table.

    Args:
        patterns: Names to show, as 'pico*' or '*_224'; all by default.
        pretrained: Names with weights in the package alone, and what these score.
        multiply_adds: Count multiply-adds too, beside those of full attention; a second a model.
        as_json: Print JSON, not a table.
        output: A Markdown file to write instead, with everything.
    """
    names = chosen(patterns, pretrained)
    rows = (facts(name, multiply_adds or output is not None) for name in names)
    if output is not None or as_json:
        found = list(counted(rows, 'counting', len(names), 'models'))
        if output is None:
            print(json.dumps(found, indent=2))
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(HEADER + ''.join(f'{markdown(row)}\n' for row in found))
        return
    columns = [c for c in COLUMNS if multiply_adds or c not in ('multiply_adds', 'full_attention')]
    for line in plain(names, rows, columns):
        print(line, flush=True)
    if not (patterns or pretrained or multiply_adds):
        print('With weights in the package: --pretrained. Multiply-adds of an image: --multiply-adds.')
