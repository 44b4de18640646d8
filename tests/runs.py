"""What several tests share: a small recipe, what a run leaves behind, images told apart by content, processes."""

import itertools
import multiprocessing
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor

from linvision.data import ImageSet
from linvision.models.projection import SHARING
from linvision.models.projection_kinds import PROJECTIONS
from linvision.train import Recipe, train

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CPU = torch.device('cpu')
PROCESSES = multiprocessing.get_context('forkserver')  # new processes as copies of one that has imported this
PROCESSES.set_forkserver_preload(['timm', 'torch.distributed.fsdp', 'linvision.train'])


def small(folder: Path, **changes: Any) -> Recipe:
    """A run of seconds on the fake data set, in two stages, in an output folder."""
    settings = dict(
        model='test_linformer_vit',
        dataset='fake',
        output_dir=folder,
        data_dir=folder.parent,
        stages=((8, 0.5), (16, 0.5)),
        precision='fp32',
        device='cpu',
        threads=1,
    )
    return Recipe().replace(**{**settings, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    """The exported weights of a run."""
    return timm.create_model(f'local-dir:{folder}/model', pretrained=True).state_dict()


def assert_stops_change_nothing(recipe: Recipe, folder: Path, *stops: int) -> dict[str, Any]:
    """A run that is stopped after some steps, and goes on, ends with the weights of one that never stops, to the bit.

    Gives the metrics of the latter, which runs in the folder of the recipe; the other has its own.
    """
    metrics = train(recipe)
    for stop in (*stops, 0):
        train(recipe.replace(output_dir=folder, max_steps=stop))
    whole, resumed = weights(recipe.run.output_dir), weights(folder)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    return metrics


def events(folder: Path) -> 'EventAccumulator':
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / 'tensorboard'), size_guidance={'images': 0}).Reload()


def image_set(n: int = 40, side: int = 6, img_size: int = 8, in_chans: int = 1) -> ImageSet:
    """Images that are told apart by their content: image i holds i + 1 everywhere but in one corner."""
    images = (torch.arange(n, dtype=torch.uint8) + 1)[:, None, None, None].expand(n, in_chans, side, side).clone()
    images[:, :, 0, 0] = 200
    return ImageSet(images, torch.arange(n), tuple(str(i) for i in range(n)), img_size)


def data_config(images: ImageSet) -> dict[str, Any]:
    """What a run on this set writes about how images are read."""
    mean, std = images.statistics()
    return {'mean': mean, 'std': std, **images.data_config(1.0)}


def save_folder(images: ImageSet, folder: Path) -> list[Path]:
    """A set as PNG files, folder/CLASS/00000.png, …; their paths in the set's order."""
    paths = []
    for i, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
        paths.append(folder / images.classes[label] / f'{i:05}.png')
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(paths[-1])
    return paths


def free_port() -> int:
    """A port of this machine at which processes can meet."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return int(free.getsockname()[1])


def in_two_processes(function: Callable[..., None], *arguments: Any) -> None:
    """function(rank, *arguments) in two processes; an error of either is raised."""
    mp.start_processes(function, arguments, nprocs=2, start_method='forkserver')


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases of a parametrized test, of which all but the quick ones are slow."""
    quick = list(quick)
    slow = pytest.mark.slow
    return [c if c in quick else pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=slow) for c in cases]


KINDS_AND_SHARING = slow_but(  # every kind, and every sharing; heads of their own have other shapes in convolutions
    {('conv', 'none'), *((kind, 'layerwise') for kind in [*PROJECTIONS, 'none']), *(('linear', s) for s in SHARING)},
    itertools.product([*PROJECTIONS, 'none'], SHARING),
)
