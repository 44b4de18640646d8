"""The four groups of a recipe's settings: data, optimization, augmentation, and the run itself.

What is written below a field is its text in `--help`.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from linvision.data import Augmentation


@dataclass(frozen=True)
class Data:
    """What is learnt from, and how it is cut into batches."""

    dataset: str = 'fashion_mnist'
    """Name of the dataset."""
    dataset_args: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Arguments of the dataset, as in `--dataset-args num_classes 1000` for shards."""
    data_dir: Path = Path('data')
    """Folder that holds the data; a set that is fetched goes there."""
    download: bool = True
    """Fetch data that is missing."""
    val_fraction: float = 0.0
    """Share of the training set kept apart, by seed, to choose settings on."""
    img_size: int = 0
    """Image size of a run without stages (0: the images' own, at most the model's)."""
    stages: tuple[tuple[int, float], ...] = ()
    """Coarse to fine: image sizes, each with its share of the run, as in `--stages 16 0.7 32 0.3`."""
    crop_mode: Literal['center', 'border', 'squash'] = 'center'
    """What becomes of files that are not square: their middle, a border around them, or stretched (timm's names)."""
    native_sizes: bool = False
    """Image files keep their shape and are seen whole, shrunk where they have more tokens than a square of `img_size`
    has. For linformer_vit_* models."""
    batch_size: int = 32
    """Images in a step, over all processes."""
    accumulate: int = 1
    """Parts in which each process takes its share of a batch: the same result in less memory."""
    eval_batch_size: int = 100
    """Images in a step of evaluation."""
    workers: int = 0
    """Processes that read and change images (0: the process that trains)."""
    on_bad_image: Literal['stop', 'skip'] = 'stop'
    """What becomes of an image that cannot be read: the run stops and names it, or it is left out and counted."""


@dataclass(frozen=True)
class Optim:
    """How it is learnt: optimizer, learning rate and loss."""

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
    sched: Literal['cosine', 'constant'] = 'cosine'
    """How the learning rate goes on after the warm-up: 'cosine', down to zero, or 'constant'."""
    warmup: float = 0.05
    """Share of the run with a rising learning rate."""
    clip_grad: float = 1.0
    """Largest norm of the gradient (0: no limit)."""
    smoothing: float = 0.0
    """Label smoothing."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is then what is scored and exported (0: off)."""
    teacher: str = ''
    """A trained model to learn from besides the labels: a folder with `model.safetensors`, or a name of timm's."""
    teacher_weight: float = 0.5
    """Weight of the teacher's part of the loss; the labels have the rest."""
    teacher_temperature: float = 1.0
    """Temperature at which student and teacher are compared."""


@dataclass(frozen=True)
class Augment:
    """What is changed at random in the images that are trained on."""

    augmentation: Literal['torchvision', 'albumentations', 'kornia', 'torch'] = 'torchvision'
    """Who changes images: the first two one by one on the CPU, 'kornia' and 'torch' in batches on the device."""
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
    mixup: float = 0.0
    """Alpha of Mixup (0: off)."""
    cutmix: float = 0.0
    """Alpha of CutMix (0: off)."""

    @property
    def changes(self) -> Augmentation:
        """What is changed in one image, and by whom."""
        names = [f.name for f in dataclasses.fields(Augmentation) if f.name != 'library']
        return Augmentation(self.augmentation, **{name: getattr(self, name) for name in names})

    @property
    def mixes(self) -> bool:
        """Whether images and labels are mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class Run:
    """How long, where and on what; and what is left behind."""

    output_dir: Path = Path('outputs/run')
    """Folder for metrics, model, checkpoints and TensorBoard. The same command again resumes the run in it."""
    epochs: float = 1.0
    """Passes over the training set; fractions are allowed. As a flag it switches `max_minutes` off."""
    max_minutes: float = 0.0
    """Minutes of training that replace `epochs`: learning rate and stages then follow the clock (0: off). Not beside
    `--epochs`."""
    max_steps: int = 0
    """Stop after this many steps, as if interrupted; the schedule stays that of the whole run (0: off)."""
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
    """Start over; what a run has left in the output folder moves into a folder `earlier_1` within it."""
    dry_run: bool = False
    """Print the plan (model, tokens, memory, steps), take one step, and write nothing."""
    device: str = 'auto'
    """Torch device; 'auto' takes the accelerator if there is one."""
    precision: Literal['auto', 'fp32', 'bf16', 'fp16'] = 'auto'
    """Of what is computed; 'auto' is bf16 where the processor or the card computes in it, else fp32."""
    parallel: Literal['ddp', 'fsdp', 'sequence'] = 'ddp'
    """How several processes train: 'ddp' (each has the whole model), 'fsdp' (each has a part of every block) or
    'sequence' (each has a part of every image, as `sequence` says, and the whole model)."""
    sequence: int = 0
    """Processes that share each image, each with some rows of it, under any `parallel` (0: one, or with 'sequence' all
    of them)."""
    compile: Literal['auto', 'on', 'off'] = 'auto'
    """Compile the blocks with `torch.compile`, whole or in chunks; 'auto' does on CUDA, for linformer_vit_* models."""
    chunk_size: int | Literal['auto'] = 'auto'
    """Images × tokens that a block handles at a time (0: all)."""
    grad_checkpointing: bool = False
    """Keep only the input of each block, and compute it again in the backward pass."""
    threads: int = 0
    """CPU threads (0: torch's choice)."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
