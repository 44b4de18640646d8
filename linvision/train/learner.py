"""What learns: a model, and all that must follow it when its parameters are sharded, resized or restored.

The loss and the moving average are timm's task, the optimizer and its schedule timm's, sharding PyTorch's FSDP2. At a
stage boundary `set_input_size` replaces the parameters whose shape depends on the image size (projection, positions):
these start with fresh moments; every other parameter keeps its own.
"""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.tensor import DTensor

from linvision.train.checkpoint import first_line, load_shards
from linvision.train.model import check_batch, compile_blocks, create_model, freeze, idle_projection, set_size
from linvision.train.objective import OBJECTIVES
from linvision.train.optimizer import carry_state, create_optimizer, create_schedule
from linvision.train.parallel import Processes
from linvision.train.precision import autocast
from linvision.train.pretrained import load_backbone
from linvision.train.recipe import Recipe

UNSHARDED = sharded.StateDictOptions(full_state_dict=True)


class Learner:
    """A model with its loss, moving average, optimizer, schedule and loss scaler.

    Args:
        recipe: What to train.
        shape: What `create_model` needs: `in_chans` and `num_classes`.
        img_size: Image size of the first stage to come.
        last_img_size: Image size of the last stage, which the model is made for.
        updates: Updates in the whole run, over which the schedule extends.
        mean, std: How images are normalised, for a teacher that wants them otherwise.
        processes: The processes of the run.
        classes: What the images show, for a head that comes with the weights, and for a teacher.
        starts: Load the weights that the recipe starts from; else those of a checkpoint follow.
    """

    def __init__(
        self,
        recipe: Recipe,
        shape: dict[str, int],
        img_size: int,
        last_img_size: int,
        updates: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        processes: Processes,
        classes: tuple[str, ...] = (),
        starts: bool = True,
    ) -> None:
        self.recipe, self.shape, self.last_img_size = recipe, shape, last_img_size
        self.updates, self.processes, self.classes = updates, processes, classes
        self.fsdp = recipe.run.parallel == 'fsdp'
        model: Any = self.create(img_size)  # Any: timm's factory sets pretrained_cfg, no class declares it
        check_batch(model, recipe, processes.shares)
        self.head_kept = False
        if recipe.init and starts:
            self.head_kept = load_backbone(model, recipe.init, classes if recipe.task == 'classify' else ())
        if self.fsdp and not hasattr(model, 'blocks'):
            raise ValueError(f'{recipe.model} has no blocks that FSDP could shard; use --parallel ddp.')
        model.pretrained_cfg = {**model.pretrained_cfg, 'mean': mean, 'std': std}
        self.objective = OBJECTIVES[recipe.task](recipe)
        self.adopt(model)

    # ------------------------------------------------------------------------------------------------------ making it

    def create(self, img_size: int) -> VisionTransformer:
        """A new model, initialised for the last stage and then given another image size."""
        model = create_model(self.recipe, self.shape, self.last_img_size).to(self.processes.device)
        set_size(model, img_size)
        freeze(model, self.recipe.freeze)
        if self.recipe.run.grad_checkpointing:
            model.set_grad_checkpointing(True)
        return model

    def adopt(self, model: VisionTransformer, average: VisionTransformer | None = None) -> None:
        """A new task of timm's for a model, and a moving average that begins as the model, or as the one there was."""
        self.task = self.objective.task(model, self.last_img_size, self.processes.device, self.classes)
        if self.recipe.optim.ema_decay:
            ema = self.task.setup_ema(decay=self.recipe.optim.ema_decay, use_warmup=True)
            if average is not None:
                unwrap_model(ema).load_state_dict(average.state_dict())

    def start(self, precision: str) -> None:
        """Compile, distribute and make the optimizer, once the model is what it will be."""
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=precision == 'fp16')
        self.arrange()

    def arrange(self) -> None:
        """Whatever refers to the present parameters: compiled code, shards or DDP, optimizer and schedule."""
        model = self.model
        for each in (model, self.ema) if self.ema is not None else (model,):
            self.compiled = compile_blocks(each, self.recipe.run.compile, self.processes.device)
            self.processes.divide(each)
        if self.fsdp:
            for each in (model, self.ema) if self.ema is not None else (model,):
                self.processes.shard(each)
        elif self.processes.count > 1:
            device = self.processes.device
            # a depth-wise kernel has one input channel: its gradient's strides differ in name only
            warnings.filterwarnings('ignore', 'Grad strides do not match bucket view strides')
            self.task.prepare_distributed(device_ids=[device.index] if device.type == 'cuda' else None)
        self.optimizer = create_optimizer(self.recipe.optim, model, self.precision)
        self.schedule = create_schedule(self.recipe.optim, self.optimizer, self.updates)

    @property
    def model(self) -> VisionTransformer:
        """The model itself, without what is wrapped around it."""
        return unwrap_model(self.task.get_trainable_module())

    @property
    def ema(self) -> VisionTransformer | None:
        """The moving average of the model, where there is one."""
        return unwrap_model(self.task.get_trainable_module(ema=True)) if self.task.has_ema() else None

    @property
    def scored(self) -> VisionTransformer:
        """The model that is scored and exported: the moving average where there is one."""
        return self.model if self.ema is None else self.ema

    # ------------------------------------------------------------------------------------------------------- learning

    def update(self, images: Tensor, labels: Tensor, progress: float, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """One step: forward and backward in `accumulate` parts, clip, update, average.

        Args:
            images: This process's share of the batch, (B, C, height, width).
            labels: Their labels, (B), or (B, classes) where they are mixed.
            progress: Share of the run that is done, 0..1, for the learning rate.
            step: Steps taken before this one.

        Returns:
            The loss of this share, the norm of the gradient before it was clipped, and logits; all detached.
        """
        self.schedule.step(round(progress * self.updates))
        parts = self.recipe.data.accumulate
        losses, logits = [], []
        for i, (x, y) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            with nullcontext() if i == parts - 1 else self.task.no_sync():
                with autocast(images.device, self.precision):
                    result = self.task(x, y)
                self.scaler.scale(result['loss'] / parts).backward()
            losses.append(result['loss'].detach())
            logits.append(result['output'].detach())
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.model.parameters())
        grad_norm = nn.utils.clip_grad_norm_(parameters, self.recipe.optim.clip_grad or float('inf'))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.update_ema(step=step + 1)
        return torch.stack(losses).mean(), unsharded(grad_norm).detach(), torch.cat(logits)

    def set_size(self, img_size: int) -> None:
        """Another image size for the model and its moving average, and for all that refers to their parameters."""
        old, previous = dict(self.model.named_parameters()), self.optimizer
        models = [model for model in (self.model, self.ema) if model is not None]
        if self.fsdp:  # a sharded model cannot be resized: whole ones take its place
            size, config = self.model.patch_embed.img_size[0], self.model.pretrained_cfg
            states = [sharded.get_model_state_dict(model, options=UNSHARDED) for model in models]
            models = [self.create(size) for _ in states]
            for model, state in zip(models, states, strict=True):
                model.load_state_dict(state)
                model.pretrained_cfg = config
        for model in models:
            idle = None if self.recipe.init else idle_projection(model)
            set_size(model, img_size)
            if idle is not None:  # a random E would undo what full attention has learnt
                idle.pool()
        freeze(models[0], self.recipe.freeze)
        self.adopt(*models)
        if self.processes.count > 1:
            gc.collect()  # the hooks of DDP go with the task that held it
        self.arrange()
        carry_state(previous, old, self.optimizer, dict(self.model.named_parameters()))

    @contextmanager
    def whole_model(self) -> Iterator[VisionTransformer]:
        """The scored model, for whole images and with all its weights in every process, to export or to look into."""
        if not self.fsdp and self.processes.sequence == 1:
            yield self.scored.eval()
            return
        model = self.create(self.scored.patch_embed.img_size[0])
        model.load_state_dict(sharded.get_model_state_dict(self.scored, options=UNSHARDED))
        yield model.eval()

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint holds: what the first process writes, and what each writes its shards of."""
        state = {'scaler': self.scaler.state_dict(), 'schedule': self.schedule.state_dict()}
        if self.fsdp:
            return state, self.shards()
        return {
            **state,
            'model': self.model.state_dict(),
            'ema': self.ema.state_dict() if self.ema is not None else {},
            'optimizer': self.optimizer.state_dict(),
        }, {}

    def shards(self) -> dict[str, Any]:
        """Model, moving average and optimizer by parameter name, sharded."""
        shards = {
            'model': sharded.get_model_state_dict(self.model),
            'optimizer': sharded.get_optimizer_state_dict(self.model, self.optimizer),
        }
        return shards if self.ema is None else {**shards, 'ema': sharded.get_model_state_dict(self.ema)}

    def restore(self, state: dict[str, Any], path: Any) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: The checkpoint is of another model.
        """
        try:
            self.scaler.load_state_dict(state['scaler'])
            if self.fsdp:
                shards = self.shards()
                load_shards(path, shards)
                sharded.set_model_state_dict(self.model, shards['model'])
                sharded.set_optimizer_state_dict(self.model, self.optimizer, shards['optimizer'])
                if self.ema is not None:
                    sharded.set_model_state_dict(self.ema, shards['ema'])
            else:
                self.model.load_state_dict(state['model'])
                if self.ema is not None:
                    self.ema.load_state_dict(state['ema'])
                self.optimizer.load_state_dict(state['optimizer'])
            self.schedule.load_state_dict(state['schedule'])
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError | dist.DistError):
                raise
            raise ValueError(
                f'{path} is a checkpoint of another model ({first_line(error)}). Nothing was changed. Choose '
                'another --output-dir, or start over beside it with --fresh.'
            ) from error


def unsharded(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
