"""What a training run is: a model, what it learns, and four groups of settings (`settings.py`).

A file in `recipes/` is a `Recipe` with its groups. To everything else a recipe is flat: flags have no prefixes,
`replace` takes a field by its name alone, and `to_dict` is what metrics, checkpoints and results keep. So no two fields
have the same name, whatever their groups.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import timm
from timm.optim import get_optimizer_class, list_optimizers

from linvision.data.datasets import check_name
from linvision.nearest import nearest
from linvision.rules import FLAG, SIDE, Rule, at_least, check, is_number, is_whole
from linvision.train.settings import Augment, Data, Optim, Run

GROUPS = {'data': Data, 'optim': Optim, 'augment': Augment, 'run': Run}
MOST = 10**9  # in size, of whole numbers and lengths of runs; beyond, a count overflows somewhere
LARGEST = 1e38  # in size, of other numbers: about what fp32 holds
SEEDS = at_least(0, 2**63 - 1)
RULES = {
    'threads': at_least(0, 1024),  # OpenMP aborts the process where the system has no more
    'workers': at_least(0, 1024),
    'img_size': at_least(0, SIDE),
    'batch_size': at_least(1),
    'accumulate': at_least(1),
    'keep_checkpoints': at_least(1),
    'sequence': at_least(0),
    'mask_size': at_least(1),
    'freeze': at_least(-1),
    'eval_batch_size': at_least(1),
    'log_every': at_least(1),
    'checkpoint_every': at_least(1),
    **dict.fromkeys(
        ('epochs', 'max_minutes', 'eval_every'),
        Rule(f'a finite number of at most {MOST:,} in size', lambda x: is_number(x, -MOST, MOST)),
    ),
    'chunk_size': Rule("'auto' or at least 0", lambda x: x == 'auto' or is_whole(x, 0)),
}
NOT_NEGATIVE = (
    *('lr', 'max_minutes', 'max_steps', 'clip_grad', 'weight_decay', 'eval_every', 'mixup', 'cutmix', 'shift'),
    *('layer_decay', 'teacher_temperature'),
)
FRACTIONS = ('warmup', 'val_fraction', 'ema_decay', 'smoothing', 'hflip', 'erase', 'teacher_weight', 'color_jitter')
# what a setting must be by the type of its default
KINDS = {
    bool: FLAG,
    int: Rule(f'a whole number of at most {MOST:,} in size', lambda x: is_whole(x, -MOST, MOST)),
    float: Rule(f'a finite number of at most {LARGEST:g} in size', lambda x: is_number(x, -LARGEST, LARGEST)),
}


@dataclass(frozen=True)
class Recipe:
    """A training run. The defaults train nothing in particular: a file in `recipes/` fills them in."""

    model: str = 'linformer_vit_pico_patch1_32'
    """Name of a timm model; '' for that of `init`, at its image size unless another is named."""
    model_args: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Arguments of the model, as in `--model-args projection linear proj_len 32`."""
    init: str = ''
    """Weights to start from: a folder with a model, `hf-hub:…`, or a timm name. The head is kept for the same
    classes, else new."""
    freeze: int = 0
    """Blocks that are not trained, from the first, with what stands before them (-1: all but the head)."""
    task: Literal['classify', 'masked_pixels'] = 'classify'
    """What is learnt: classes, or hidden pixels from the rest (then the labels are not looked at)."""
    mask_ratio: float = 0.5
    """Share of the image that is hidden (`masked_pixels`)."""
    mask_size: int = 4
    """Side of what is hidden together, in pixels (`masked_pixels`)."""

    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    augment: Augment = field(default_factory=Augment)
    run: Run = field(default_factory=Run)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, whichever group they are in, or with whole groups changed.

        Raises:
            ValueError: There is no such field; the nearest are listed.
        """
        for name in changes:
            _check_known('field of a recipe', name, {*self.fields(), *GROUPS})
        groups = {}
        for name, kind in GROUPS.items():
            group = changes.pop(name, getattr(self, name))
            inner = {f.name: changes.pop(f.name) for f in dataclasses.fields(kind) if f.name in changes}
            groups[name] = dataclasses.replace(group, **inner)
        return dataclasses.replace(self, **groups, **changes)

    def fields(self) -> dict[str, Any]:
        """All fields by name, without their groups."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in GROUPS}
        for name in GROUPS:
            group = getattr(self, name)
            values |= {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
        return values

    def to_dict(self) -> dict[str, Any]:
        """All fields in plain types, for JSON and checkpoints."""
        plain = {k: str(v) if isinstance(v, Path) else copy.deepcopy(v) for k, v in self.fields().items()}
        stages = [list(stage) for stage in self.data.stages]
        return plain | {'stages': stages, 'crop_scale': list(self.augment.crop_scale)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """The recipe of which `to_dict` gave this; fields that are not there have their defaults.

        Raises:
            ValueError: There is a name of no field.
        """
        kinds: dict[str, Callable[[Any], Any]] = {'data_dir': Path, 'output_dir': Path, 'crop_scale': tuple}
        kinds['stages'] = lambda stages: tuple(map(tuple, stages))
        kinds['compile'] = lambda told: {True: 'on', False: 'off'}.get(told, told)  # as version 0.1 wrote it
        return cls().replace(**{k: kinds[k](v) if k in kinds else v for k, v in plain.items()})

    def images_at_once(self, count: int) -> int:
        """Images of a batch that each of `count` processes has at once: one part of its share.

        Raises:
            ValueError: The batch cannot be divided.
        """
        batch_size, accumulate = self.data.batch_size, self.data.accumulate
        parts = count * accumulate
        if batch_size % parts:
            raise ValueError(
                f'batch_size is global and must be a multiple of processes × accumulate, got {batch_size} for '
                f'{count} × {accumulate}. The nearest that fit are {max(1, batch_size // parts) * parts} and '
                f'{(batch_size // parts + 1) * parts}.'
            )
        if self.augment.mixes and batch_size // count % 2:
            raise ValueError(
                f'Mixup and CutMix need an even number of images in each process, got {batch_size} for {count}.'
            )
        return batch_size // parts

    def validate(self) -> None:
        """Raise ValueError for what cannot be trained; the message says what was wanted, what came and what is near."""
        data, optim, run = self.data, self.optim, self.run
        _check_known('model', self.model, timm.list_models('*') + timm.list_models(include_tags=True))
        check_name(data.dataset)
        _check_known('optimizer', optim.opt, list_optimizers())
        self.check_numbers()
        if not str(run.output_dir):
            raise ValueError("output_dir is empty: name a folder. The one that you are in is '.'.")
        if self.task == 'masked_pixels' and (self.augment.mixes or optim.teacher):
            raise ValueError('masked_pixels looks at no labels: there is no Mixup, CutMix or teacher for it.')
        if self.augment.mixes and data.batch_size % 2:
            raise ValueError(f'Mixup and CutMix need an even batch_size, got {data.batch_size}.')
        if (run.parallel == 'sequence' or run.sequence > 1) and (
            self.task == 'masked_pixels' or optim.teacher or self.augment.cutmix
        ):
            raise ValueError(
                'Processes that share an image see some rows of it each: masked_pixels, a teacher and CutMix need all '
                'of it. Leave these out, or --sequence and --parallel sequence.'
            )
        if data.native_sizes:
            self.check_native_sizes()
        if run.parallel == 'fsdp' and run.precision == 'fp16':
            raise ValueError("fp16 needs a loss scaler, which FSDP does not share between processes; use 'bf16'.")
        if optim.teacher and len(data.stages) > 1:
            raise ValueError(f'With a teacher there is one image size; got {len(data.stages)} stages.')
        sizes, shares = [size for size, _ in data.stages], [share for _, share in data.stages]
        if not all(is_whole(size, 1, SIDE) for size in sizes):
            raise ValueError(f'The image sizes of the stages must be at least 1 and at most {SIDE:,}, got {sizes}.')
        if data.img_size and data.stages:
            raise ValueError(
                f'img_size is for runs without stages, but there are {list(data.stages)}: say --stages '
                f'{data.img_size} 1 instead.'
            )
        if shares and not (all(is_number(share, 0) and share > 0 for share in shares) and abs(sum(shares) - 1) <= 1e-6):
            raise ValueError(f'The shares of the stages must be positive and sum to 1, got {shares}.')
        arguments = inspect.signature(get_optimizer_class(optim.opt, bind_defaults=False)).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in arguments.values()):
            for name in optim.opt_args:
                _check_known('name in opt_args', name, set(arguments) - {'params', 'lr', 'weight_decay'})
        check(optim.opt_args, {name: _form_of(argument) for name, argument in arguments.items()})

    def check_native_sizes(self) -> None:
        """Raise ValueError for what images of different sizes do not go with; the message says what to leave out."""
        data, run, ours = self.data, self.run, 'linformer_vit' in self.model
        refused = {
            f'--model {self.model}, as only linformer_vit_* models take such batches': not ours,
            '--stages, which are squares (say --img-size)': data.stages,
            f'--crop-mode {data.crop_mode}, as nothing is cropped or filled': data.crop_mode != 'center',
            '--mixup and --cutmix, which need images of one size': self.augment.mixes,
            '--task masked_pixels': self.task == 'masked_pixels',
            '--teacher, which sees images of one size': self.optim.teacher,
            f'--parallel {run.parallel} (say ddp)': run.parallel != 'ddp',
            '--sequence, as processes share images of one size': run.sequence > 1,
            '--compile on, which makes a graph for every size': run.compile == 'on',
        }
        found = [words for words, given in refused.items() if given]
        if found:
            raise ValueError(f'native_sizes trains on images of different sizes. Leave out {"; ".join(found)}.')

    def check_numbers(self) -> None:
        """Raise ValueError for a number that is out of its range."""
        values = self.fields()
        own = [f for kind in (Recipe, *GROUPS.values()) for f in dataclasses.fields(kind)]
        check(values, {f.name: KINDS[type(f.default)] for f in own if type(f.default) in KINDS} | {'seed': SEEDS})
        for name in ('model_args', 'opt_args', 'dataset_args'):
            numbers = {k: v for k, v in values[name].items() if isinstance(v, float)}
            check(numbers, dict.fromkeys(numbers, KINDS[float]))
        for f in own:
            if get_origin(f.type) is Literal:
                _check_known(f.name, values[f.name], get_args(f.type))
        if not self.run.max_minutes > 0 and not self.run.epochs > 0:
            raise ValueError(f'epochs must be above 0, got {self.run.epochs}.')
        check(values, RULES)
        for name in NOT_NEGATIVE:
            if not values[name] >= 0:
                raise ValueError(f'{name} must not be negative, got {values[name]}.')
        for name in FRACTIONS:
            if not 0 <= values[name] <= 1:
                raise ValueError(f'{name} must lie between 0 and 1, got {values[name]}.')
        if self.data.val_fraction == 1:
            raise ValueError('val_fraction must lie below 1, got 1: no image would be left to train on.')
        if not 0 <= self.augment.rand_augment <= 30:
            raise ValueError(f'rand_augment must lie between 0 and 30, got {self.augment.rand_augment}.')
        smallest, largest = self.augment.crop_scale
        if not 0 < smallest <= largest <= 1:
            raise ValueError(
                f'crop_scale must be two numbers, 0 < smallest <= largest <= 1, got {smallest} and {largest}.'
            )
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f'mask_ratio must lie between 0 and 1, got {self.mask_ratio}.')


def _form_of(argument: inspect.Parameter) -> Rule:
    """What an optimizer's argument must be, by its default: optimizers look at it in their first step, or never."""
    default = argument.default
    if isinstance(default, tuple):
        n = len(default)
        words = f'{n} numbers, as {default}, which a recipe can say and a flag cannot'
        return Rule(words, lambda x: isinstance(x, tuple | list) and len(x) == n and all(map(is_number, x)))
    if isinstance(default, bool):
        return FLAG
    if isinstance(default, int | float):  # torch's SGD has a whole 0 where any number may be
        return KINDS[int if argument.annotation in (int, 'int') else float]
    return Rule('anything', lambda x: True)


def _check_known(what: str, name: str, names: Any) -> None:
    if name not in names:
        raise ValueError(nearest(what, name, names))
