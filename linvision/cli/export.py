"""A model as a file that needs neither linvision nor timm: `torch.export` (.pt2) or ONNX, for any number of images.

    linvision export linformer_vit_pico_patch1_32.fashion_mnist --output outputs/pico.onnx
    linvision export linformer_vit_pico_patch1_32.fashion_mnist --output outputs/pico.onnx --free-size
    linvision export outputs/demo --output outputs/demo.pt2

The first argument is the folder of a run or a model, `hf-hub:OWNER/MODEL`, or a name with weights. ONNX needs
`pip install 'linvision[onnx]'`. Before it reports success the file is read again, by `torch.export.load` or
onnxruntime, and must give the model's own outputs on batches of one, two and five images; a file that does not is
removed. With `--free-size` images may have any height and width from a least on, and the three batches have three
sizes. How images are to be read and what the classes are is written into the file, ONNX's metadata or the extra file
`images.json` of `torch.export`, and printed as one line of JSON, with the largest difference found.
"""

import importlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import tyro
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from linvision.cli.pretrained import load_vit
from linvision.data.native_sizes import NativeSizes
from linvision.models.projection_kinds import PROJECTIONS
from linvision.rules import SIDE

BATCHES = (1, 2, 5)
TOLERANCE = 1e-4  # of the largest output, in fp32
OPEN = ('linear', 'separable', 'dynamic', 'none')  # projections that are the same equation at every size


def open_axes(model: Any, facts: dict[str, Any]) -> tuple[dict[int, Any]]:
    """The axes of images that the file leaves open: those that are said by a name."""
    axes: dict[int, Any] = {0: torch.export.Dim('batch')}
    for axis, name in enumerate(facts['input']):
        if axis > 1 and isinstance(name, str):
            patch = model.patch_embed.patch_size[axis - 2]
            tokens = torch.export.Dim(f'{name}_tokens', min=least_side(model), max=SIDE // patch)
            axes[axis] = tokens if patch == 1 else patch * tokens
    return (axes,)


def least_side(model: Any) -> int:
    """Tokens in a side of the smallest images of a file of open sizes: above K in all, so that no layer is full."""
    return 1 + math.isqrt(max(1, *(math.prod(getattr(block.attn, 'rows', ())) for block in model.blocks)))


def refuse_fixed_cells(model: Any) -> None:
    """Raise ValueError for a projection whose equation depends on the image size, and so cannot be left open."""
    kind = None if getattr(model, 'projection', None) is None else model.projection.kind
    name = next((name for name, known in PROJECTIONS.items() if known is kind), 'none')
    if name not in OPEN:
        raise ValueError(
            f'Of free size are exports with projection={", ".join(map(repr, OPEN))}: {name!r} cuts the token grid into '
            'cells, whose number changes with its size. Export it without --free-size, once for each size.'
        )


def grids(model: Any) -> list[tuple[int, int]]:
    """Three token grids to compare on: about the model's own, flatter and wider."""
    least = least_side(model)
    h, w = (max(side, least) for side in model.patch_embed.grid_size)
    return [(h, w), (max(least, h // 2 + 1), w), (h, w + w // 2 + 1)]


def write_pt2(model: nn.Module, images: Tensor, file: Path, facts: dict[str, Any]) -> None:
    """The model as an exported program, with what a user needs to know as the extra file `images.json`."""
    program = torch.export.export(model, (images,), dynamic_shapes=open_axes(model, facts))
    torch.export.save(program, file, extra_files={'images.json': json.dumps(facts)})


def read_pt2(file: Path) -> Callable[[Tensor], Tensor]:
    """What an exported program computes."""
    return torch.export.load(file).module()


def write_onnx(model: nn.Module, images: Tensor, file: Path, facts: dict[str, Any]) -> None:
    """The model as one ONNX file, with what a user needs to know as JSON in its metadata."""
    names: dict[str, Any] = {'input_names': ['images'], 'output_names': ['logits' if model.num_classes else 'features']}
    with warnings.catch_warnings(), quiet('onnxscript.optimizer'):
        warnings.simplefilter('ignore')  # what onnxscript and its packages deprecate among themselves
        program = torch.onnx.export(
            model, (images,), dynamo=True, dynamic_shapes=open_axes(model, facts), verbose=False, **names
        )
    assert program is not None  # of dynamo
    program.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    program.save(str(file), external_data=False)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Errors alone of a logger: the exporter warns of each constant that it leaves as it is."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    """What onnxruntime computes."""
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


FORMATS: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = {  # with the packages that are asked for first
    '.pt2': (write_pt2, read_pt2, ()),
    '.onnx': (write_onnx, read_onnx, ('onnxscript', 'onnxruntime')),
}


def largest_difference(model: nn.Module, run: Callable[[Tensor], Tensor], batches: list[Tensor]) -> float:
    """How far a file's outputs are from the model's, relative to the largest, on several batches of images.

    Raises:
        ValueError: Too far.
    """
    largest = 0.0
    for images in batches:
        wanted, found = model(images), run(images)
        if found.shape != wanted.shape:
            raise ValueError(f'The file gave {tuple(found.shape)} outputs for {len(images)} images: removed.')
        error = (found - wanted).abs().max().item() / (wanted.abs().max().item() or 1.0)  # all zero: of no training
        if not error <= TOLERANCE:
            raise ValueError(f'The file gave outputs {error:.1e} from those of the model: removed.')
        largest = max(largest, error)
    return largest


def say(words: str) -> None:
    """What is being done, beside the one line of JSON."""
    print(words, file=sys.stderr, flush=True)


@torch.no_grad()
def export(model: Any, file: Path, free_size: bool = False) -> dict[str, Any]:
    """Write a file and check it.

    Args:
        model: The model; it is put into eval mode.
        file: Where to; the suffix says the format.
        free_size: Leave height and width open; the model must be made with `dynamic_img_size=True`.

    Returns:
        What a user of the file needs to know.

    Raises:
        ValueError: An unknown suffix, a model without tokens, a projection whose size cannot be left open, or a file
            whose outputs are not the model's; it is removed, and one that was there before stays.
    """
    if file.suffix not in FORMATS:
        raise ValueError(f'The name of the file must end in {" or ".join(FORMATS)}, got {file.name!r}.')
    if not hasattr(model, 'patch_embed'):
        raise ValueError(
            f'Exports are of models with a patch_embed, whose image size is known, got {type(model).__name__}.'
        )
    write, read, packages = FORMATS[file.suffix]
    for package in packages:
        importlib.import_module(package)
    model.eval()
    if hasattr(model, 'set_chunk_size'):
        model.set_chunk_size(0)  # whole blocks, which can be traced
    patch, sizes = model.patch_embed.patch_size, [tuple(model.patch_embed.img_size)] * len(BATCHES)
    if free_size:
        refuse_fixed_cells(model)
        if not model.dynamic_img_size:
            raise ValueError('A file of free size is of a model made with dynamic_img_size=True; this one is not.')
        sizes = [(h * patch[0], w * patch[1]) for h, w in grids(model)]
    batches = [torch.randn(n, model.in_chans, *size) for n, size in zip(BATCHES, sizes, strict=True)]
    images = batches[-1][:2]  # which the graph is traced with
    file.parent.mkdir(parents=True, exist_ok=True)
    config = resolve_model_data_config(model)
    facts = {
        'input': ['batch', model.in_chans, *(('height', 'width') if free_size else model.patch_embed.img_size)],
        **{k: config[k] for k in ('mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')},
        'classes': list(model.pretrained_cfg.get('label_names') or ()),
    }
    if NativeSizes.read_by(model) and not free_size:  # the file has one size: the middle square
        facts['crop_mode'] = 'center'
    if free_size:
        facts |= {'multiple_of': list(patch), 'at_least': [least_side(model) * side for side in patch]}
    part = file.with_name(f'part-{file.name}')  # nobody shall find what is not known to be right
    try:
        say(f'tracing and writing {file}')
        write(model, images, part, facts)
        shapes = [list(batch.shape) for batch in batches]
        say(f'comparing it with the model on images of shape {", ".join(map(str, shapes))}')
        difference = largest_difference(model, read(part), batches)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return {
        'file': str(file),
        'size_mib': round(file.stat().st_size / 2**20, 2),
        **facts,
        'largest_relative_difference': difference,
        'batches': list(BATCHES),
        'sizes': [list(size) for size in dict.fromkeys(sizes)],
    }


def main(model: tyro.conf.Positional[str], output: Path = Path('outputs/model.onnx'), free_size: bool = False) -> None:
    """Export a model.

    Args:
        model: Folder of a run or a model, `hf-hub:OWNER/MODEL`, or a name with weights.
        output: The file; `.onnx` or `.pt2` says the format.
        free_size: Leave height and width open; E and positions are resized inside the file.
    """
    original = load_vit(model, None, 0, **({'dynamic_img_size': True} if free_size else {}))
    try:
        report = export(original, output, free_size)
    except RuntimeError as error:  # torch's, of a model that cannot be traced
        raise ValueError(f'{model} cannot be exported: {error}') from error
    print(json.dumps(report))
