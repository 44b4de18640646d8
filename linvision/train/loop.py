"""The training loop, read from top to bottom: a recipe in; a trained model, its score and its curves out.

Notable here:

- One process or many (`parallel.py`): each takes its share of every batch; the first prints and writes.
- Steps or minutes: one number, `progress` from 0 to 1, drives the learning rate, the stages and the end.
- Coarse to fine: `stages` changes the image size through the model's `set_input_size` (`learner.py`).
- Order, augmentation and dropout are functions of (seed, epoch, index) and (seed, step): a resumed run repeats nothing.
- A run can die at any moment and loses the steps since its last checkpoint (`checkpoint.py`).
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linvision.data import Batches
from linvision.data.order import key
from linvision.train.board import Board
from linvision.train.checkpoint import (
    check_same_images,
    check_same_run,
    newest_checkpoint,
    random_states,
    read_state,
    save_checkpoint,
    set_random_states,
)
from linvision.train.data import TrainingData
from linvision.train.folder import finished_run, run_folder
from linvision.train.learner import Learner
from linvision.train.memory import memory_advice, peak_memory_gib
from linvision.train.metrics import write_results
from linvision.train.optimizer import CLOCK_UPDATES
from linvision.train.parallel import Processes, processes
from linvision.train.plan import plan
from linvision.train.precision import choose_precision
from linvision.train.recipe import Recipe
from linvision.train.setup import count_tokens, resolved

LOG_MINUTES = 0.5  # of training without a line, at most


def train(recipe: Recipe, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Train, score and export a model; under `torchrun`, every process calls this.

    Args:
        recipe: What to train. `recipe.output_dir` receives `metrics.json`, `model/`, `checkpoints/` and `tensorboard/`.
            An unfinished run in it is resumed; a finished one is reported as it is.
        interrupted: Asked after every step; true ends the run with a checkpoint.

    Returns:
        The contents of `metrics.json`; empty where the run was stopped before its end, or was a dry one.

    Raises:
        ValueError: A recipe that cannot be trained, or a folder with a run of another recipe.
        FileNotFoundError: The data is missing.
        OSError: The output folder cannot be written, or another process is running in it.
        FloatingPointError: The loss is not finite; the last checkpoint is kept.
        MemoryError: Memory does not suffice; the message says what to change.
    """
    recipe = resolved(recipe)
    recipe.validate()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with processes(recipe.device, recipe.parallel) as joined:
        recipe.share(joined.count)
        if recipe.dry_run:
            with memory_advice(recipe, joined, lambda: 'in the first step'):
                Run(recipe, joined, None).try_one_step()
            return {}
        with run_folder(recipe, joined) as folder:
            finished = joined.first(lambda: finished_run(folder, recipe))
            if finished:
                found = [f'{k} {100 * finished[k]:.2f} %' for k in ('top1', 'val_top1') if k in finished]
                if joined.main:
                    print(f'{folder} holds this run, finished: {", ".join(found) or "not scored"}.')
                return finished
            with memory_advice(recipe, joined, lambda: 'before the first step'):
                run = Run(recipe, joined, folder)
            try:
                with memory_advice(recipe, joined, run.where):
                    return run.to_its_end(interrupted)
            finally:
                run.board.close()


@dataclass
class Position:
    """How far a run is: what a checkpoint holds beside the weights.

    Attributes:
        step: Steps taken; with the seed, also the place in the data: step = epoch × batches of an epoch + batch.
        minutes: Minutes of training so far.
        stage: Stage of the last step.
        tokens: Tokens seen.
        best_score: Best score on the validation slice.
        best_step: Where it was.
        curve: Scores on the validation slice on the way, each with its step and minutes.
        bad_images: What could not be read in training, in words.
    """

    step: int = 0
    minutes: float = 0.0
    stage: int = 0
    tokens: int = 0
    best_score: float = 0.0
    best_step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    bad_images: list[str] = field(default_factory=list)


class Run:
    """A run of a recipe in these processes, at its beginning or where its last checkpoint left it.

    Args:
        recipe: What to train.
        joined: The processes.
        folder: The output folder; None writes nothing.
    """

    def __init__(self, recipe: Recipe, joined: Processes, folder: Path | None) -> None:
        self.recipe, self.processes, self.folder = recipe, joined, folder
        self.at, self.last_log, self.saved_step = Position(), (0, 0.0), -1
        path = folder and joined.first(lambda: newest_checkpoint(folder / 'checkpoints'))
        found = read_state(path) if path else {}
        if found:
            check_same_run(folder, self.identity, found['recipe'])
            self.at = Position(**found['position'])
            self.last_log, self.saved_step = (self.at.step, self.at.minutes), self.at.step
        torch.manual_seed(recipe.seed)
        self.finite, self.finite_until = torch.ones((), dtype=torch.bool, device=joined.device), self.at.step
        self.data = TrainingData(recipe, joined)
        check_same_images(folder, self.data.fingerprint, found.get('images', {}))
        self.data.batches.bad_images.update(self.at.bad_images)
        self.updates = CLOCK_UPDATES if recipe.max_minutes else self.data.batches.order.steps(recipe.epochs)
        self.make_learner(found, path)
        self.board = Board(folder if joined.main else None, recipe, self.at.step, joined.main)
        self.board.say(
            f'{recipe.model}: {sum(p.numel() for p in self.learner.model.parameters()):,} parameters at '
            f'{self.img_size}×{self.img_size}, '
            f'{recipe.dataset}: {len(self.data.train_set):,} training images, {joined.device}, '
            f'{self.learner.precision}, {torch.get_num_threads()} thread(s)'
            + (f', {joined.count} processes ({recipe.parallel})' if joined.count > 1 else '')
            + (f'; resumed at step {self.at.step}' if found else '')
        )
        for note in [*self.data.notes, *([f'weights from {recipe.init}'] if recipe.init and not found else [])]:
            self.board.say(note)

    def make_learner(self, found: dict[str, Any], path: Path | None) -> None:
        """The model and all that follows it, as new or as a checkpoint's state says, in a precision that suits it."""
        recipe, joined, data = self.recipe, self.processes, self.data
        if found:
            recipe = recipe.replace(init='')  # what it started from may be gone
        sizes = (self.img_size, data.stages[-1][0])
        self.learner = Learner(
            recipe, data.shape, *sizes, self.updates, data.mean, data.std, joined, data.train_set.classes
        )
        if found:
            precision, self.probe = found['precision'], found['probe']
        else:
            shape = (recipe.share(joined.count), data.train_set.in_chans, self.img_size, self.img_size)
            sample = torch.randn(shape, device=joined.device)
            precision, self.probe = choose_precision(recipe.precision, self.learner.model, sample, joined)
        self.learner.start(precision)
        if found:
            self.learner.restore(found['learner'], path)
            set_random_states(found['random'])

    @property
    def identity(self) -> dict[str, Any]:
        """What another run of the folder must agree with."""
        return {**self.recipe.to_dict(), 'processes': self.processes.count}

    @property
    def img_size(self) -> int:
        """Image size of the present stage."""
        return self.data.stages[self.at.stage][0]

    @property
    def progress(self) -> float:
        """Share of the run that is done; 1 or more at its end."""
        if self.recipe.max_minutes:
            return self.at.minutes / self.recipe.max_minutes
        return self.at.step / self.updates

    # ------------------------------------------------------------------------------------------------------- the loop

    def to_its_end(self, interrupted: Callable[[], bool]) -> dict[str, Any]:
        """Train through the stages, then score and export; {} where it is stopped before."""
        if self.recipe.max_steps and self.at.step >= self.recipe.max_steps and self.progress < 1:
            self.board.say(f'{self.at.step} steps are taken already, and --max-steps is {self.recipe.max_steps}')
            return {}
        while self.progress < 1:
            stage = stage_at(self.data.stages, self.progress)
            if stage != self.at.stage:
                self.at.stage = stage
                self.learner.set_size(self.img_size)
                if not self.learner.objective.best_of_any_size:
                    self.at.best_step = 0
            self.board.say(
                f'stage {stage + 1} of {len(self.data.stages)}: {self.img_size}×{self.img_size} images from step '
                f'{self.at.step}'
            )
            if not self.train_stage(interrupted):
                self.save()
                self.board.say(f'stopped after {self.at.step} steps as asked; the same command goes on')
                return {}
        self.save()
        skipped = len(self.data.bad_images())
        left_out = f'; {skipped:,} of the training images could not be read and were left out' * bool(skipped)
        self.board.say(f'{self.at.step} steps are taken{left_out}; scoring')
        return self.finish()

    def train_stage(self, interrupted: Callable[[], bool]) -> bool:
        """Steps until the stage ends (true) or the run is to stop (false)."""
        recipe, at, stage = self.recipe, self.at, self.at.stage
        self.learner.task.train()
        tokens, waited, tick = recipe.batch_size * count_tokens(self.learner.model), 0.0, time.perf_counter()
        for images, labels in self.data.stream(at.step, self.img_size):
            waited += (time.perf_counter() - tick) * self.data.read  # else it is the device that is waited for
            images, labels = self.prepare(images, labels)
            loss, grad_norm, logits = self.step(images, labels)
            at.step, at.tokens = at.step + 1, at.tokens + tokens

            # the clock and the signals, agreed on
            tock = time.perf_counter()
            minutes, stop = self.processes.largest(at.minutes + (tock - tick) / 60, float(interrupted()))
            at.minutes, tick = minutes, tock
            stop = bool(stop) or at.step == recipe.max_steps and self.progress < 1

            # log, evaluate, save
            logs = at.step % recipe.log_every == 0 or at.minutes - self.last_log[1] > LOG_MINUTES or self.progress >= 1
            scores = recipe.eval_every and at.step % self.data.batches.order.steps(recipe.eval_every) == 0
            saves = at.step % recipe.checkpoint_every == 0
            if logs or scores or saves or stop:
                self.settle()
            if logs:
                self.log(loss, grad_norm, logits, labels, waited)
                waited = 0.0
            if scores and not stop:
                self.validate()
            if saves:
                self.save()
            if stop:
                return False
            if self.progress >= 1 or stage != stage_at(self.data.stages, self.progress):
                break
            tick = time.perf_counter()
        return True

    def settle(self) -> None:
        """Wait for what is queued on the device, as training: what follows is not."""
        if self.processes.device.type != 'cpu':
            start = time.perf_counter()
            torch.accelerator.synchronize()
            (self.at.minutes,) = self.processes.largest(self.at.minutes + (time.perf_counter() - start) / 60)

    def prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Seed what is drawn in a step, and mix its images."""
        seed = key(self.recipe.seed, self.at.step, self.processes.rank)
        torch.manual_seed(seed)
        if self.recipe.mixes:
            np.random.seed(seed % 2**32)
            images, labels = self.data.mixup(images, labels)
        if self.at.step == 0:
            self.board.batch(images, 0)
        return images, labels

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One update, noting whether its loss and gradient are finite; see `Learner.update`."""
        loss, grad_norm, logits = self.learner.update(images, labels, self.progress, self.at.step)
        self.finite &= torch.isfinite(loss)
        if not self.learner.scaler.is_enabled():  # which skips steps whose gradient overflows
            self.finite &= torch.isfinite(grad_norm)
        if images.device.type == 'cpu':  # elsewhere a look waits for the device: only at a log and before a checkpoint
            self.check_finite(self.at.step + 1)
        return loss, grad_norm, logits

    def check_finite(self, step: int) -> None:
        """Raise FloatingPointError where a loss or gradient since the last look, up to `step` steps, was not finite."""
        if not self.finite:
            last = step - 1
            where = f'step {last}' if self.finite_until == last else f'steps {self.finite_until} to {last}'
            raise FloatingPointError(
                f'The loss or its gradient is not finite in {where}. The checkpoints in {self.folder}/checkpoints are '
                'as they were, and go on only with the settings that they were made with: try a smaller --lr or '
                '--precision fp32 with --fresh, or in another --output-dir.'
            )
        self.finite_until = step

    def where(self) -> str:
        """What the run is doing, for an error."""
        return f'of {count_tokens(self.learner.model):,} tokens each, after {self.at.step} steps'

    # --------------------------------------------------------------------------------------- what a run leaves behind

    def log(self, loss: Tensor, grad_norm: Tensor, logits: Tensor, labels: Tensor, waited: float) -> None:
        """A line and a point of each curve."""
        self.check_finite(self.at.step)
        seconds = max((self.at.minutes - self.last_log[1]) * 60, 1e-9)
        images_per_s = (self.at.step - self.last_log[0]) * self.recipe.batch_size / seconds
        loss = self.processes.mean(loss)
        lr = max(group['lr'] for group in self.learner.optimizer.param_groups)
        scalars = {
            'train/loss': float(loss),
            'train/lr': lr,
            'train/grad_norm': float(grad_norm),
            **self.learner.objective.scalars(logits, labels),
            'speed/images_per_s': images_per_s,
            'speed/tokens_per_s': images_per_s * count_tokens(self.learner.model),
            'speed/waiting_for_data': min(waited / seconds, 1.0),
            'memory/peak_gib': peak_memory_gib(self.processes.device),
        }
        self.last_log = (self.at.step, self.at.minutes)
        self.board.log(self.at.step, min(self.progress, 1), scalars, self.at.minutes)
        self.board.weights(self.learner.model, self.at.step, self.progress)

    def validate(self) -> None:
        """Score the validation slice on the way; the best so far keeps its checkpoint."""
        if self.data.validation is None:
            return
        objective, at = self.learner.objective, self.at
        scores = self.score(self.data.validation, self.img_size, self.learner.precision)
        self.board.scores('val', at.step, scores)
        at.curve.append({'step': at.step, 'minutes': at.minutes, **scores})
        if not at.best_step or objective.quality(scores) > objective.quality({objective.best: at.best_score}):
            at.best_score, at.best_step = scores[objective.best], at.step
            self.save()

    def score(self, batches: Batches, img_size: int, precision: str = 'fp32') -> dict[str, float]:
        """Scores of the model that is scored, over all processes."""
        return self.learner.objective.score(self.learner.scored, batches, img_size, precision)

    def save(self) -> None:
        """A checkpoint, unless there is one of this step."""
        if self.saved_step == self.at.step:
            return
        self.check_finite(self.at.step)
        self.board.flush()
        self.at.bad_images = self.data.bad_images()
        own, shards = self.learner.state()
        state = {
            'recipe': self.identity,
            'images': self.data.fingerprint,
            'position': asdict(self.at),
            'precision': self.learner.precision,
            'probe': self.probe,
            'random': random_states(),
            'learner': own,
        }
        keep = (self.recipe.keep_checkpoints, self.at.best_step)
        save_checkpoint(self.folder / 'checkpoints', self.at.step, state, shards, self.processes, *keep)
        self.saved_step = self.at.step

    def finish(self) -> dict[str, Any]:
        """Scores, pictures, the exported model and `metrics.json`."""
        recipe, scores, size = self.recipe, {}, self.data.stages[-1][0]
        if self.img_size != size:  # the last stage was too short for a step
            self.at.stage = len(self.data.stages) - 1
            self.learner.set_size(size)
        sets = {'val': self.data.validation, 'test': self.data.test}
        sets = {split: batches for split, batches in sets.items() if batches is not None}
        for split, batches in sets.items():
            scores[split] = self.score(batches, size)
            self.board.scores(split, self.at.step, scores[split])
        with self.learner.whole_model() as model:
            metrics = write_results(self, model, scores)
            for split, batches in sets.items():
                drawings, classes = self.learner.objective.pictures(), self.data.train_set.classes
                self.board.pictures(split, drawings, model, batches, size, classes, self.at.step)
        self.board.hparams(recipe, metrics, self.at.step)
        self.processes.wait()
        return metrics

    def try_one_step(self) -> None:
        """Print the plan, take one step of the largest images, and say what it took."""
        self.board.say(plan(self))
        largest = max(range(len(self.data.stages)), key=lambda stage: self.data.stages[stage][0])
        if largest != self.at.stage:
            self.at.stage = largest
            self.learner.set_size(self.img_size)
        self.learner.task.train()
        images, labels = next(self.data.stream(self.at.step, self.img_size))
        start = time.perf_counter()
        loss, _, _ = self.step(*self.prepare(images, labels))
        self.board.say(
            f'one step of {self.recipe.batch_size} images of {self.img_size}×{self.img_size} pixels taken: '
            f'{time.perf_counter() - start:.2f} s, loss {float(loss):.3f}, '
            f'{peak_memory_gib(self.processes.device):.2f} GiB in use at most. Nothing was written.'
        )


def stage_at(stages: tuple[tuple[int, float], ...], progress: float) -> int:
    """The stage that a share of the run belongs to; a share on the boundary belongs to the later one."""
    ends = np.cumsum([share for _, share in stages])
    return min(int(np.searchsorted(ends, progress + 1e-9, side='right')), len(stages) - 1)
