"""What a training run is: one dataclass, each field a flag on the command line."""

import dataclasses
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
from timm.optim import get_optimizer_class, list_optimizers

from linvision.data import Augmentation
from linvision.data.datasets import check_name
from linvision.nearest import nearest
from linvision.train.parallel import PARALLEL

SCHEDULES = ('cosine', 'tanh', 'poly', 'step', 'wsd', 'rsqrt', 'constant')
PRECISIONS = ('auto', 'fp32', 'bf16', 'fp16')


@dataclass
class Recipe:
    """A training run. The defaults train nothing in particular: a file in `recipes/` fills them in."""

    model: str = 'linformer_vit_pico_patch1_32'
    """Name of a timm model; '' for that of `init`, at its image size unless another is named."""
    model_args: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Arguments of the model, as in `--model-args projection linear proj_len 32`."""
    init: str = ''
    """Weights to start from: a folder with a model, `hf-hub:…`, or a timm name. The head only for the same classes."""
    freeze: int = 0
    """Blocks that are not trained, from the first, with what stands before them (-1: all but the head)."""
    task: Literal['classify', 'masked_pixels'] = 'classify'
    """What is learnt: classes, or hidden pixels from the rest (then the labels are not looked at)."""
    mask_ratio: float = 0.5
    """Share of the image that is hidden (`masked_pixels`)."""
    mask_size: int = 4
    """Side of what is hidden together, in pixels (`masked_pixels`)."""
    dataset: str = 'fashion_mnist'
    """Name of the dataset."""
    dataset_args: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Arguments of the dataset, as in `--dataset-args num_classes 1000` for shards."""
    data_dir: Path = Path('data')
    """Folder that holds the data; a set that is fetched goes there."""
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
    img_size: int = 0
    """Image size of a run without stages (0: the images' own, at most the model's)."""
    crop_mode: Literal['center', 'border', 'squash'] = 'center'
    """What becomes of files that are not square: their middle, a border around them, or stretched (timm's names)."""
    batch_size: int = 32
    """Images in a step, over all processes."""
    accumulate: int = 1
    """Parts in which each process takes its share of a batch: the same result in less memory."""
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
    layer_decay: float = 1.0
    """Factor on the learning rate from each layer to the one before it (1: the same for all)."""
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
    teacher: str = ''
    """A trained model to learn from besides the labels: a folder with `model.safetensors`, or a name of timm's."""
    teacher_weight: float = 0.5
    """Weight of the teacher's part of the loss; the labels have the rest."""
    teacher_temperature: float = 1.0
    """Temperature at which student and teacher are compared."""
    augmentation: Literal['torchvision', 'albumentations', 'kornia'] = 'torchvision'
    """Who changes images: 'torchvision' and 'albumentations' one by one on the CPU, 'kornia' batches on the device."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest share of the image in a random resized crop (1 1: off)."""
    hflip: float = 0.0
    """Probability of a horizontal flip."""
    shift: int = 0
    """Largest random shift, in pixels."""
    rand_augment: int = 0
    """Magnitude of RandAugment, 0 to 30; torchvision's alone (0: off)."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation (0: off)."""
    erase: float = 0.0
    """Probability that a random rectangle is erased."""

    val_fraction: float = 0.0
    """Share of the training set kept apart, by seed, to choose settings on."""
    test: bool = True
    """Score the test set at the end; switch it off while you choose settings."""
    eval_every: float = 0.0
    """Epochs between evaluations on the way (0: only at the end)."""
    log_every: int = 50
    """Steps between two lines of log and two points in TensorBoard; slow steps have one every half a minute."""
    checkpoint_every: int = 500
    """Steps between checkpoints: what a run that dies can lose."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep, besides the best on the validation slice."""
    fresh: bool = False
    """Start over; what the output folder holds moves into a folder `earlier_1` within it."""
    dry_run: bool = False
    """Print the plan (model, tokens, memory, steps), take one step, and write nothing."""

    device: str = 'auto'
    """Torch device; 'auto' takes the accelerator if there is one."""
    precision: str = 'auto'
    """'auto', 'fp32', 'bf16' or 'fp16'; 'auto' times this model in fp32 and bf16 and takes the faster."""
    parallel: str = 'ddp'
    """How several processes train: 'ddp' (each has the whole model) or 'fsdp' (each has a part of every block)."""
    compile: bool = False
    """Compile the model with `torch.compile`."""
    chunk_size: int | Literal['auto'] = 'auto'
    """Images × tokens that a block handles at a time (0: all)."""
    grad_checkpointing: bool = False
    """Keep only the input of each block, and compute it again in the backward pass."""
    workers: int = 0
    """Processes that read and change images (0: the process that trains)."""
    on_bad_image: Literal['stop', 'skip'] = 'stop'
    """What becomes of an image that cannot be read: the run stops and names it, or it is left out and counted."""
    threads: int = 0
    """CPU threads (0: torch's choice)."""
    seed: int = 0
    """Seed of weights, order and augmentation."""

    def validate(self) -> None:
        """Raise ValueError for what cannot be trained; the message says what was wanted, what came and what is near."""
        _known('model', self.model, timm.list_models('*') + timm.list_models(pretrained=True))
        check_name(self.dataset)
        _known('optimizer', self.opt, list_optimizers())
        _known('schedule', self.sched, SCHEDULES)
        _known('precision', self.precision, PRECISIONS)
        _known('way to be parallel', self.parallel, PARALLEL)
        self._check_numbers()
        if self.task == 'masked_pixels' and (self.mixes or self.teacher):
            raise ValueError('masked_pixels looks at no labels: there is no Mixup, CutMix or teacher for it.')
        if self.mixes and self.batch_size % 2:
            raise ValueError(f'Mixup and CutMix need an even batch_size, got {self.batch_size}.')
        if self.parallel == 'fsdp' and self.precision == 'fp16':
            raise ValueError("fp16 needs a loss scaler, which FSDP does not share between processes; use 'bf16'.")
        if self.teacher and len(self.stages) > 1:
            raise ValueError(f'With a teacher there is one image size; got {len(self.stages)} stages.')
        if any(size < 1 for size, _ in self.stages):
            raise ValueError(
                f'The image sizes of the stages must be at least 1, got {[size for size, _ in self.stages]}.'
            )
        if self.img_size and self.stages:
            raise ValueError(
                f'img_size is for runs without stages, but there are {list(self.stages)}: say --stages '
                f'{self.img_size} 1 instead.'
            )
        shares = [share for _, share in self.stages]
        if shares and (abs(sum(shares) - 1) > 1e-6 or min(shares) <= 0):
            raise ValueError(f'The shares of the stages must be positive and sum to 1, got {shares}.')
        _known_arguments('opt_args', self.opt_args, get_optimizer_class(self.opt, bind_defaults=False))

    def _check_numbers(self) -> None:
        """Raise ValueError for a number that is out of its range."""
        if not self.max_minutes > 0 and not self.epochs > 0:
            raise ValueError(f'epochs must be above 0, got {self.epochs}.')
        for name, low in {
            'threads': 0,
            'workers': 0,
            'img_size': 0,
            'batch_size': 1,
            'accumulate': 1,
            'keep_checkpoints': 1,
            'mask_size': 1,
            'freeze': -1,
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
            'layer_decay',
            'teacher_temperature',
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f'{name} must not be negative, got {getattr(self, name)}.')
        for name in (
            'warmup',
            'val_fraction',
            'ema_decay',
            'smoothing',
            'hflip',
            'erase',
            'teacher_weight',
            'color_jitter',
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f'{name} must lie between 0 and 1, got {getattr(self, name)}.')
        if self.val_fraction == 1:
            raise ValueError('val_fraction must lie below 1, got 1: no image would be left to train on.')
        if not 0 <= self.rand_augment <= 30:
            raise ValueError(f'rand_augment must lie between 0 and 30, got {self.rand_augment}.')
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f'crop_scale must be two numbers, 0 < smallest <= largest <= 1, got {low} and {high}.')
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f'mask_ratio must lie between 0 and 1, got {self.mask_ratio}.')

    def replace(self, **changes: Any) -> 'Recipe':
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def changes(self) -> Augmentation:
        """What is changed at random, and by whom."""
        names = [f.name for f in dataclasses.fields(Augmentation) if f.name != 'library']
        return Augmentation(self.augmentation, **{name: getattr(self, name) for name in names})

    @property
    def mixes(self) -> bool:
        """Whether images and labels are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def share(self, count: int) -> int:
        """Images of a batch for each of `count` processes and each part of its share.

        Raises:
            ValueError: The batch cannot be divided.
        """
        parts = count * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f'batch_size is global and must be a multiple of processes × accumulate, got {self.batch_size} for '
                f'{count} × {self.accumulate}. The nearest that fit are {max(1, self.batch_size // parts) * parts} and '
                f'{(self.batch_size // parts + 1) * parts}.'
            )
        share = self.batch_size // parts
        if self.model_args.get('head_norm') and (parts > 1 or share < 2):
            raise ValueError(
                'head_norm normalises over the images that are together: it needs one process, accumulate 1 and at '
                f'least 2 images, got {count}, {self.accumulate} and a batch_size of {self.batch_size}.'
            )
        if self.mixes and self.batch_size // count % 2:
            raise ValueError(
                f'Mixup and CutMix need an even number of images in each process, got {self.batch_size} for {count}.'
            )
        return share

    def to_dict(self) -> dict[str, Any]:
        """The recipe in plain types, for JSON and checkpoints."""
        values = dataclasses.asdict(self)
        values['stages'] = [list(stage) for stage in self.stages]
        values['crop_scale'] = list(self.crop_scale)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def _known_arguments(what: str, arguments: dict[str, Any], function: Any) -> None:
    known = inspect.signature(function).parameters
    for name in arguments:
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise ValueError(nearest(f'name in {what}', name, set(known) - {'params', 'lr', 'weight_decay'}))


def _known(what: str, name: str, names: Any) -> None:
    if name not in names:
        raise ValueError(nearest(what, name, names))
