"""A model as a file that needs neither linvision nor timm: `torch.export` (.pt2) or ONNX, for any number of images.

    linvision export linformer_vit_pico_patch1_32.fashion_mnist --output outputs/pico.onnx
    linvision export outputs/demo --output outputs/demo.pt2

The first argument is the folder of a run or a model, `hf-hub:OWNER/MODEL`, or a name with weights. ONNX needs
`pip install 'linvision[onnx]'`. Before it reports success the file is read again, by `torch.export.load` or
onnxruntime, and must give the model's own outputs on batches of one, two and five images; a file that does not is
removed. How images are to be read and what the classes are is written into the file, ONNX's metadata or the extra file
`images.json` of `torch.export`, and printed as one line of JSON, with the largest difference found.
"""

import json
import logging
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

BATCHES = (1, 2, 5)
TOLERANCE = 1e-4  # of the largest output, in fp32


def dynamic_batch() -> tuple[dict[int, Any]]:
    """Any number of images."""
    return ({0: torch.export.Dim('batch')},)


def write_pt2(model: nn.Module, images: Tensor, file: Path, facts: dict[str, Any]) -> None:
    """The model as an exported program, with what a user needs to know as the extra file `images.json`."""
    program = torch.export.export(model, (images,), dynamic_shapes=dynamic_batch())
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
            model, (images,), dynamo=True, dynamic_shapes=dynamic_batch(), verbose=False, **names
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


FORMATS = {'.pt2': (write_pt2, read_pt2), '.onnx': (write_onnx, read_onnx)}


def largest_difference(model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """How far a file's outputs are from the model's, relative to the largest, in batches of several sizes.

    Raises:
        ValueError: Too far.
    """
    largest = 0.0
    for count in BATCHES:
        wanted, found = model(images[:count]), run(images[:count])
        if found.shape != wanted.shape:
            raise ValueError(f'The file gave {tuple(found.shape)} outputs for {count} images: removed.')
        error = (found - wanted).abs().max().item() / (wanted.abs().max().item() or 1.0)  # all zero: of no training
        if not error <= TOLERANCE:
            raise ValueError(f'The file gave outputs {error:.1e} from those of the model: removed.')
        largest = max(largest, error)
    return largest


def say(words: str) -> None:
    """What is being done, beside the one line of JSON."""
    print(words, file=sys.stderr, flush=True)


@torch.no_grad()
def export(model: Any, file: Path) -> dict[str, Any]:
    """Write a file and check it.

    Args:
        model: The model; it is put into eval mode.
        file: Where to; the suffix says the format.

    Returns:
        What a user of the file needs to know.

    Raises:
        ValueError: An unknown suffix, a model without tokens, or a file whose outputs are not the model's; it is
            removed, and one that was there before stays.
    """
    if file.suffix not in FORMATS:
        raise ValueError(f'The name of the file must end in {" or ".join(FORMATS)}, got {file.name!r}.')
    if not hasattr(model, 'patch_embed'):
        raise ValueError(
            f'Exports are of models with a patch_embed, whose image size is known, got {type(model).__name__}.'
        )
    write, read = FORMATS[file.suffix]
    model.eval()
    if hasattr(model, 'set_chunk_size'):
        model.set_chunk_size(0)  # whole blocks, which can be traced
    images = torch.randn(max(BATCHES), model.in_chans, *model.patch_embed.img_size)
    file.parent.mkdir(parents=True, exist_ok=True)
    config = resolve_model_data_config(model)
    facts = {
        'input': ['batch', model.in_chans, *model.patch_embed.img_size],
        **{k: config[k] for k in ('mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')},
        'classes': list(model.pretrained_cfg.get('label_names') or ()),
    }
    part = file.with_name(f'part-{file.name}')  # nobody shall find what is not known to be right
    try:
        say(f'tracing and writing {file}')
        write(model, images[:2], part, facts)
        say(f'comparing it with the model on batches of {", ".join(map(str, BATCHES))} images')
        difference = largest_difference(model, read(part), images)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return {
        'file': str(file),
        'size_mib': round(file.stat().st_size / 2**20, 2),
        **facts,
        'largest_relative_difference': difference,
        'batches': list(BATCHES),
    }


def main(model: tyro.conf.Positional[str], output: Path = Path('outputs/model.onnx')) -> None:
    """Export a model.

    Args:
        model: Folder of a run or a model, `hf-hub:OWNER/MODEL`, or a name with weights.
        output: The file; `.onnx` or `.pt2` says the format.
    """
    original = load_vit(model, '', 0)
    try:
        report = export(original, output)
    except RuntimeError as error:  # torch's, of a model that cannot be traced
        raise ValueError(f'{model} cannot be exported: {error}') from error
    print(json.dumps(report))
