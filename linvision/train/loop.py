"""The training loop, read from top to bottom: a recipe in; a trained model, its score and its curves out.

Notable here:

- One process or many (`parallel.py`): each takes its share of every batch; the first prints and writes.
- Steps or minutes: one number, `fraction` from 0 to 1, drives the learning rate, the stages and the end.
- Coarse to fine: `stages` changes the image size through the model's `set_input_size` (`learner.py`).
- Order, augmentation and dropout are functions of (seed, epoch, index) and (seed, step): a resumed run repeats nothing.
- A run can die at any moment and loses the steps since its last checkpoint (`checkpoint.py`).
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linvision.data import Batches
from linvision.data.order import seed_of
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
from linvision.train.finite import FiniteCheck
from linvision.train.folder import as_begun, finished_run, run_folder
from linvision.train.freed_memory import keep_freed_memory
from linvision.train.learner import Learner
from linvision.train.memory import memory_advice, peak_memory_gib
from linvision.train.metrics import run_metrics, write_metrics, write_model
from linvision.train.model import count_tokens, resolved
from linvision.train.optimizer import CLOCK_UPDATES
from linvision.train.parallel import Processes, processes
from linvision.train.plan import plan
from linvision.train.precision import choose_precision, matmul_precision_kept, use_tf32
from linvision.train.pretrained import tagged
from linvision.train.progress import Progress, stage_at
from linvision.train.recipe import Recipe

LOG_MINUTES = 0.5  # of training without a line, at most
FEW_STEPS = 100  # most models have learnt little by then


def train(recipe: Recipe, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Train, score and export a model; under `torchrun`, every process calls this.

    Args:
        recipe: What to train. Its `output_dir` receives `metrics.json`, `model/`, `checkpoints/` and `tensorboard/`.
            An unfinished run in it is resumed; a finished one is reported as it is.
        interrupted: Asked after every step; true ends the run with a checkpoint.

    Returns:
        The contents of `metrics.json`; empty where the run was stopped before its end, or was a dry one.

    Raises:
        ValueError: A recipe that cannot be trained, or a folder with a run of other settings.
        FileNotFoundError: The data is missing.
        OSError: The output folder cannot be written, or another process is running in it.
        FloatingPointError: The loss is not finite; the last checkpoint is kept.
        MemoryError: Memory does not suffice; the message says what to change.
    """
    begun = as_begun(recipe)
    recipe = resolved(recipe) if begun is recipe else begun
    recipe.validate()
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    with processes(recipe.run.device, recipe.run.parallel, recipe.run.sequence) as joined, matmul_precision_kept():
        if joined.device.type == 'cpu':
            keep_freed_memory()
        recipe.images_at_once(joined.shares)
        if recipe.run.dry_run:
            with memory_advice(recipe, joined, lambda: 'in the first step'):
                TrainingRun(recipe, joined, None).try_one_step()
            return {}
        with run_folder(recipe, joined) as folder:
            finished = joined.first(lambda: finished_run(folder, recipe))
            if finished:
                found = [f'{k} {100 * finished[k]:.2f} %' for k in ('top1', 'val_top1') if k in finished]
                if joined.main:
                    print(f'{folder} holds this run, finished: {", ".join(found) or "not scored"}.')
                return finished
            with memory_advice(recipe, joined, lambda: 'before the first step'):
                run = TrainingRun(recipe, joined, folder)
            try:
                with memory_advice(recipe, joined, run.where):
                    return run.to_its_end(interrupted)
            finally:
                run.board.close()


class TrainingRun:
    """A run of a recipe in these processes, at its beginning or where its last checkpoint left it.

    Args:
        recipe: What to train.
        joined: The processes.
        folder: The output folder; None writes nothing.
    """

    def __init__(self, recipe: Recipe, joined: Processes, folder: Path | None) -> None:
        self.recipe, self.processes, self.folder = recipe, joined, folder
        self.progress, self.last_log, self.saved_step = Progress(), (0, 0.0), -1
        path = folder and joined.first(lambda: newest_checkpoint(folder / 'checkpoints'))
        found = read_state(path) if path else {}
        if folder and found:
            check_same_run(folder, self.identity, found['recipe'])
            self.progress = Progress.of(found, path)
            self.last_log, self.saved_step = (self.progress.step, self.progress.minutes), self.progress.step
        torch.manual_seed(recipe.run.seed)
        self.finite = FiniteCheck(joined.device, self.progress.step)
        self.data = TrainingData(recipe, joined)
        if folder and found:
            check_same_images(folder, self.data.fingerprint, found.get('images', {}))
        self.data.batches.bad_images.update(self.progress.bad_images)
        self.updates = CLOCK_UPDATES if recipe.run.max_minutes else self.data.batches.order.steps(recipe.run.epochs)
        self.make_learner(found, path)
        self.board = Board(folder if joined.main else None, recipe, self.progress.step, joined.main)
        self.board.say(
            f'{recipe.model}: {sum(p.numel() for p in self.learner.model.parameters()):,} parameters at '
            f'{self.img_size}×{self.img_size}, '
            f'{self.data.title}: {len(self.data.train_set):,} training images, {joined.device}, '
            f'{self.learner.precision}, {torch.get_num_threads()} thread(s)'
            + (', compiled blocks' if self.learner.compiled else '')
            + (f', {joined.count} processes ({recipe.run.parallel})' if joined.count > 1 else '')
            + (f', {joined.sequence} for each image' if joined.sequence > 1 else '')
            + (f'; resumed at step {self.progress.step}' if found else '')
        )
        head = 'kept: its classes are the same' if self.learner.head_kept else 'new'
        notes = [f'weights from {tagged(recipe.init)}; the head is {head}'] if recipe.init and not found else []
        for note in [*self.notes, *self.data.notes, *notes]:
            self.board.say(note)

    def make_learner(self, found: dict[str, Any], path: Path | None) -> None:
        """The model and all that follows it, as new or as a checkpoint's state says, in a precision that suits it."""
        recipe, joined, data = self.recipe, self.processes, self.data
        sizes, starts = (self.img_size, data.stages[-1][0]), not found  # what it started from may be gone
        self.learner = Learner(
            recipe, data.shape, *sizes, self.updates, data.mean, data.std, joined, data.train_set.classes, starts
        )
        precision, why = (found['precision'], '') if found else choose_precision(recipe.run.precision, joined)
        self.notes = [f'{precision}, since {why}'] if why else []
        tf32 = use_tf32(precision, joined.device)
        self.notes += [tf32] if tf32 else []
        self.learner.start(precision)
        if found:
            self.learner.restore(found['learner'], path)
            with suppress(LookupError, TypeError, ValueError, RuntimeError):  # nothing in training depends on them
                set_random_states(found['random'])

    @property
    def identity(self) -> dict[str, Any]:
        """What another run of the folder must agree with."""
        return {**self.recipe.to_dict(), 'processes': self.processes.count}

    @property
    def img_size(self) -> int:
        """Image size of the present stage."""
        return self.data.stages[self.progress.stage][0]

    @property
    def fraction(self) -> float:
        """Fraction of the run that is done; 1 or more at its end."""
        if self.recipe.run.max_minutes:
            return self.progress.minutes / self.recipe.run.max_minutes
        return self.progress.step / self.updates

    @property
    def to_score(self) -> bool:
        """Whether the validation slice is scored after this step, and has not been."""
        every, step = self.recipe.run.eval_every, self.progress.step
        due = every and step and step % self.data.batches.order.steps(every) == 0
        return bool(due) and all(point['step'] != step for point in self.progress.curve)

    # ------------------------------------------------------------------------------------------------------- the loop

    def to_its_end(self, interrupted: Callable[[], bool]) -> dict[str, Any]:
        """Train through the stages, then score and export; {} where it is stopped before."""
        if self.recipe.run.max_steps and self.progress.step >= self.recipe.run.max_steps and self.fraction < 1:
            self.board.say(f'{self.progress.step} steps are taken, and --max-steps is {self.recipe.run.max_steps}')
            return {}
        if self.to_score:  # stopped before it was
            self.validate()
        while self.fraction < 1:
            stage = stage_at(self.data.stages, self.fraction)
            if stage != self.progress.stage:
                self.progress.stage = stage
                self.learner.set_size(self.img_size)
                if not self.learner.objective.best_of_any_size:
                    self.progress.best_step = 0
            self.board.say(
                f'stage {stage + 1} of {len(self.data.stages)}: {self.img_size}×{self.img_size} images from step '
                f'{self.progress.step}'
            )
            if not self.train_stage(interrupted):
                self.save()
                self.board.say(f'stopped after {self.progress.step} steps as asked; the same command goes on')
                return {}
        self.save()
        skipped = len(self.data.bad_images())
        left_out = f'; {skipped:,} of the training images could not be read and were left out' * bool(skipped)
        passes = self.progress.step * self.recipe.data.batch_size / len(self.data.train_set)
        few = self.recipe.run.max_minutes > 0 and self.progress.step < FEW_STEPS
        hint = ', which is little (try more --max-minutes, or a smaller --img-size)' * few
        self.board.say(
            f'{self.progress.step} steps are taken{hint}, {passes:.3g} passes over the images{left_out}; scoring'
        )
        return self.finish()

    def train_stage(self, interrupted: Callable[[], bool]) -> bool:
        """Steps until the stage ends (true) or the run is to stop (false)."""
        recipe, progress, stage = self.recipe, self.progress, self.progress.stage
        self.learner.task.train()
        tokens = round(recipe.data.batch_size * self.data.tokens(self.learner.model))
        waited, tick = 0.0, time.perf_counter()
        for images, labels in self.data.stream(progress.step, self.img_size):
            waited += (time.perf_counter() - tick) * self.data.reads_files  # else it is the device that is waited for
            images, labels = self.prepare(images, labels)
            loss, grad_norm, logits = self.step(images, labels)
            progress.step, progress.tokens = progress.step + 1, progress.tokens + tokens

            # the clock and the signals, agreed on
            tock = time.perf_counter()
            minutes, stop = self.processes.largest(progress.minutes + (tock - tick) / 60, float(interrupted()))
            progress.minutes, tick = minutes, tock
            stop = bool(stop) or progress.step == recipe.run.max_steps and self.fraction < 1

            # log, evaluate, save
            due = progress.step % recipe.run.log_every == 0 or progress.minutes - self.last_log[1] > LOG_MINUTES
            logs = due or self.fraction >= 1
            scores = self.to_score
            saves = progress.step % recipe.run.checkpoint_every == 0
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
            if self.fraction >= 1 or stage != stage_at(self.data.stages, self.fraction):
                break
            tick = time.perf_counter()
        return True

    def settle(self) -> None:
        """Wait for what is queued on the device, as training: what follows is not."""
        if self.processes.device.type != 'cpu':
            start = time.perf_counter()
            torch.accelerator.synchronize()
            waited = (time.perf_counter() - start) / 60
            (self.progress.minutes,) = self.processes.largest(self.progress.minutes + waited)

    def prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Seed what is drawn in a step, and mix its images."""
        seed = seed_of(self.recipe.run.seed, self.progress.step, self.processes.share)
        torch.manual_seed(seed)
        if self.recipe.augment.mixes:
            np.random.seed(seed % 2**32)
            images, labels = self.data.mixup(images, labels)
        if self.progress.step == 0:
            self.board.batch(images, 0)
        return images, labels

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One update, noting whether its loss and gradient are finite; see `Learner.update`."""
        loss, grad_norm, logits = self.learner.update(images, labels, self.fraction, self.progress.step)
        overflow = self.learner.scaler.is_enabled()  # then a gradient may, and its step is skipped
        self.finite.note(loss, *([] if overflow else [grad_norm]))
        if images.device.type == 'cpu':  # elsewhere only at a log and before a checkpoint
            self.finite.check(self.progress.step + 1, self.folder)
        return loss, grad_norm, logits

    def where(self) -> str:
        """What the run is doing, for an error."""
        return f'of {count_tokens(self.learner.model):,} tokens each, after {self.progress.step} steps'

    # --------------------------------------------------------------------------------------- what a run leaves behind

    def log(self, loss: Tensor, grad_norm: Tensor, logits: Tensor, labels: Tensor, waited: float) -> None:
        """A line and a point of each curve."""
        self.finite.check(self.progress.step, self.folder)
        seconds = max((self.progress.minutes - self.last_log[1]) * 60, 1e-9)
        images_per_s = (self.progress.step - self.last_log[0]) * self.recipe.data.batch_size / seconds
        loss = self.processes.mean(loss)
        lr = max(group['lr'] for group in self.learner.optimizer.param_groups)
        scalars = {
            'train/loss': float(loss),
            'train/lr': lr,
            'train/grad_norm': float(grad_norm),
            **self.learner.objective.scalars(logits, labels),
            'speed/images_per_s': images_per_s,
            'speed/tokens_per_s': images_per_s * self.data.tokens(self.learner.model),
            'speed/waiting_for_data': min(waited / seconds, 1.0),
            'memory/peak_gib': peak_memory_gib(self.processes.device),
        }
        self.last_log = (self.progress.step, self.progress.minutes)
        self.board.log(self.progress.step, min(self.fraction, 1), scalars, self.progress.minutes)
        self.board.weights(self.learner.model, self.progress.step, self.fraction)

    def validate(self) -> None:
        """Score the validation slice on the way; the best so far keeps its checkpoint."""
        if self.data.validation is None:
            return
        objective, progress = self.learner.objective, self.progress
        scores = self.score(self.data.validation, self.img_size, self.learner.precision)
        self.board.scores('val', progress.step, scores)
        progress.curve.append({'step': progress.step, 'minutes': progress.minutes, **scores})
        best = {objective.best: progress.best_score}
        if not progress.best_step or objective.quality(scores) > objective.quality(best):
            progress.best_score, progress.best_step = scores[objective.best], progress.step
            self.save()

    def score(self, batches: Batches, img_size: int, precision: str = 'fp32') -> dict[str, float]:
        """Scores of the model that is scored, over all processes."""
        return self.learner.objective.score(self.learner.scored, batches, img_size, precision)

    def save(self) -> None:
        """A checkpoint, unless there is one of this step, or nothing is written."""
        if self.folder is None or self.saved_step == self.progress.step:
            return
        self.finite.check(self.progress.step, self.folder)
        self.board.flush()
        self.progress.bad_images = self.data.bad_images()
        learner, shards = self.learner.state()
        state = {
            'recipe': self.identity,
            'images': self.data.fingerprint,
            'progress': asdict(self.progress),
            'precision': self.learner.precision,
            'random': random_states(),
            'learner': learner,
        }
        keep = (self.recipe.run.keep_checkpoints, self.progress.best_step)
        save_checkpoint(self.folder / 'checkpoints', self.progress.step, state, shards, self.processes, *keep)
        self.saved_step = self.progress.step

    def finish(self) -> dict[str, Any]:
        """The exported model, scores and `metrics.json`; then what may fail, since nothing depends on it: pictures."""
        recipe, joined, scores, size = self.recipe, self.processes, {}, self.data.stages[-1][0]
        if self.img_size != size:  # the last stage was too short for a step
            self.progress.stage = len(self.data.stages) - 1
            self.learner.set_size(size)
        objective, step = self.learner.objective, self.progress.step
        sets = (('val', self.data.validation), ('test', self.data.test))
        scored = {split: batches for split, batches in sets if batches is not None}
        with self.learner.whole_model() as model:
            if joined.main and self.folder:
                write_model(self.folder, objective.exported(model), self.data)
        for split, batches in scored.items():
            scores[split] = self.score(batches, size)
            self.board.scores(split, step, scores[split])
        with self.learner.whole_model() as model:  # again, since a whole copy of a sharded model beside it may not fit
            metrics = run_metrics(recipe, self.progress, self.data, self.learner, joined, model, scores)
            if joined.main and self.folder:
                write_metrics(self.folder, metrics)
            for split, batches in scored.items():
                if joined.sequence > 1 or recipe.data.native_sizes:  # of whole images of one size
                    continue
                self.board.pictures(
                    split, objective.pictures(), model, batches, size, self.data.train_set.classes, step
                )
        self.board.hparams(recipe, metrics, step)
        if joined.main and self.folder:
            self.board.say(f'model: {self.folder}/model; {objective.next_step.format(folder=self.folder)}')
        self.processes.wait()
        return metrics

    def try_one_step(self) -> None:
        """Print the plan, take one step of the largest images, and say what it took."""
        self.board.say(plan(self.recipe, self.data, self.learner, self.processes, self.updates))
        largest = max(range(len(self.data.stages)), key=lambda stage: self.data.stages[stage][0])
        if largest != self.progress.stage:
            self.progress.stage = largest
            self.learner.set_size(self.img_size)
        self.learner.task.train()
        step, size = self.data.largest(self.progress.step, self.img_size)
        images, labels = next(self.data.stream(step, self.img_size))
        start = time.perf_counter()
        loss, _, _ = self.step(*self.prepare(images, labels))
        seconds, minutes = time.perf_counter() - start, self.recipe.run.max_minutes
        passes = 60 * minutes / seconds * self.recipe.data.batch_size / len(self.data.train_set)
        self.board.say(
            f'one step of {self.recipe.data.batch_size} images of {size} taken: '
            f'{seconds:.2f} s, loss {float(loss):.3f}, {peak_memory_gib(self.processes.device):.2f} GiB in use at '
            f'most.{f" {minutes:g} minutes of them are {passes:.2g} passes over the images." * bool(minutes)} '
            'Nothing was written.'
        )
