"""What a training run is: one dataclass, each field a flag on the command line."""

import dataclasses
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.optim import get_optimizer_class, list_optimizers

from linvision.data import DATASETS
from linvision.nearest import nearest

SCHEDULES = ('cosine', 'tanh', 'poly', 'step', 'wsd', 'rsqrt', 'constant')
PRECISIONS = ('auto', 'fp32', 'bf16', 'fp16')


@dataclass
class Recipe:
    """A training run. The defaults train nothing in particular: a file in `recipes/` fills them in."""

    model: str = 'linformer_vit_pico_patch1_32'
    """Name of a timm model."""
    model_args: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Arguments of the model, as in `--model-args projection linear proj_len 32`."""
    dataset: str = 'fashion_mnist'
    """Name of the dataset."""
    data_dir: Path = Path('data')
    """Folder that holds the data; what is missing is fetched into it."""
    download: bool = True
    """Fetch data that is missing."""
    output_dir: Path = Path('outputs/run')
    """Folder for metrics, model, checkpoints and TensorBoard. The same command again resumes the run in it."""

    epochs: float = 1.0
    """Passes over the training set; fractions are allowed."""
    max_minutes: float = 0.0
    """Minutes of training that replace `epochs`: learning rate and stages then follow the clock (0: off)."""
    max_steps: int = 0
    """Stop after this many steps, as if interrupted; the schedule stays that of the whole run (0: off)."""
    stages: tuple[tuple[int, float], ...] = ()
    """Coarse to fine: image sizes, each with its share of the run, as in `--stages 16 0.7 32 0.3`."""
    batch_size: int = 32
    """Images in a step."""
    eval_batch_size: int = 100
    """Images in a step of evaluation."""

    opt: str = 'adamw'
    """Name of a timm optimizer."""
    opt_args: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Further arguments of the optimizer."""
    lr: float = 1e-3
    """Highest learning rate."""
    weight_decay: float = 0.05
    """Weight decay of matrices; biases, norms, positions and projections have none."""
    sched: str = 'cosine'
    """Name of a timm schedule of the learning rate."""
    warmup: float = 0.05
    """Share of the run with a rising learning rate."""
    clip_grad: float = 1.0
    """Largest norm of the gradient (0: no limit)."""
    smoothing: float = 0.0
    """Label smoothing."""
    mixup: float = 0.0
    """Alpha of Mixup (0: off)."""
    cutmix: float = 0.0
    """Alpha of CutMix (0: off)."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is then what is scored and exported (0: off)."""
    hflip: float = 0.0
    """Probability of a horizontal flip."""
    shift: int = 0
    """Largest random shift, in pixels."""

    val_fraction: float = 0.0
    """Share of the training set kept apart, by seed, to choose settings on."""
    test: bool = True
    """Score the test set at the end; switch it off while you choose settings."""
    eval_every: float = 0.0
    """Epochs between evaluations on the way (0: only at the end)."""
    log_every: int = 50
    """Steps between two lines of log and two points in TensorBoard."""
    checkpoint_every: int = 500
    """Steps between checkpoints: what a run that dies can lose."""

    device: str = 'auto'
    """Torch device; 'auto' takes the accelerator if there is one."""
    precision: str = 'auto'
    """'auto', 'fp32', 'bf16' or 'fp16'; 'auto' times this model in fp32 and bf16 and takes the faster."""
    threads: int = 0
    """CPU threads (0: torch's choice)."""
    seed: int = 0
    """Seed of weights, order and augmentation."""

    def validate(self) -> None:
        """Raise ValueError for what cannot be trained; the message says what was wanted, what came and what is near."""
        _known('model', self.model, timm.list_models('*') + timm.list_models(pretrained=True))
        _known('dataset', self.dataset, DATASETS)
        _known('optimizer', self.opt, list_optimizers())
        _known('schedule', self.sched, SCHEDULES)
        _known('precision', self.precision, PRECISIONS)
        if not self.max_minutes > 0 and not self.epochs > 0:
            raise ValueError(f'epochs must be above 0, got {self.epochs}.')
        for name, low in {
            'threads': 0,
            'batch_size': 1,
            'eval_batch_size': 1,
            'log_every': 1,
            'checkpoint_every': 1,
        }.items():
            if getattr(self, name) < low:
                raise ValueError(f'{name} must be at least {low}, got {getattr(self, name)}.')
        for name in (
            'lr',
            'max_minutes',
            'max_steps',
            'clip_grad',
            'weight_decay',
            'eval_every',
            'mixup',
            'cutmix',
            'shift',
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f'{name} must not be negative, got {getattr(self, name)}.')
        for name in ('warmup', 'val_fraction', 'ema_decay', 'smoothing', 'hflip'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f'{name} must lie between 0 and 1, got {getattr(self, name)}.')
        if self.val_fraction == 1:
            raise ValueError('val_fraction must lie below 1, got 1: no image would be left to train on.')
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f'Mixup and CutMix need an even batch_size, got {self.batch_size}.')
        if any(size < 1 for size, _ in self.stages):
            raise ValueError(
                f'The image sizes of the stages must be at least 1, got {[size for size, _ in self.stages]}.'
            )
        shares = [share for _, share in self.stages]
        if shares and (abs(sum(shares) - 1) > 1e-6 or min(shares) <= 0):
            raise ValueError(f'The shares of the stages must be positive and sum to 1, got {shares}.')
        _known_arguments('opt_args', self.opt_args, get_optimizer_class(self.opt, bind_defaults=False))

    def to_dict(self) -> dict[str, Any]:
        """The recipe in plain types, for JSON and checkpoints."""
        values = dataclasses.asdict(self)
        values['stages'] = [list(stage) for stage in self.stages]
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def _known_arguments(what: str, arguments: dict[str, Any], function: Any) -> None:
    known = inspect.signature(function).parameters
    for name in arguments:
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise ValueError(nearest(f'name in {what}', name, set(known) - {'params', 'lr', 'weight_decay'}))


def _known(what: str, name: str, names: Any) -> None:
    if name not in names:
        raise ValueError(nearest(what, name, names))
