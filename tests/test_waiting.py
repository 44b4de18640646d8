"""A step on an accelerator queues its work and goes on: nothing in it asks the device for a number.

On a CPU each such question is an operator of its own, which a mode of dispatch sees.
"""

import pytest
import torch
from runs import small
from torch.utils._python_dispatch import TorchDispatchMode

from linvision.train.data import TrainingData
from linvision.train.evaluate import evaluate
from linvision.train.finite import FiniteCheck
from linvision.train.learner import Learner
from linvision.train.masked_pixels import evaluate_masked
from linvision.train.parallel import Processes

QUESTIONS = ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique', 'is_nonzero', 'equal.default')


class Questions(TorchDispatchMode):
    """Notes the operators whose result's value or size the host needs.

    Args:
        known: Numbers that are the host's own: steps that an optimizer counts in tensors on the CPU.
    """

    def __init__(self, known=()):
        super().__init__()
        self.asked, self.known = [], {tensor.data_ptr() for tensor in known}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator).removeprefix('aten.')
        of_mask = name.startswith('index.Tensor') and any(i is not None and i.dtype == torch.bool for i in args[1])
        if of_mask or name.startswith(QUESTIONS) and args[0].data_ptr() not in self.known:
            self.asked.append(name)
        return operator(*args, **kwargs or {})


def test_questions_are_seen():
    with Questions() as questions:
        x = torch.arange(3.0)
        _ = x[x > 1], float(x.sum()), bool(x.any()), x.nonzero()
    # the index of a mask looks for its places itself
    assert [name.split('.')[0] for name in questions.asked] == ['index', *['_local_scalar_dense'] * 2, 'nonzero']


@pytest.mark.parametrize(
    'changes',
    [
        {'opt': 'muon', 'hflip': 0.5, 'shift': 1, 'erase': 0.5, 'crop_scale': (0.5, 1.0)},
        {'opt': 'adamw', 'ema_decay': 0.9, 'hflip': 0.5, 'cutmix': 1.0, 'accumulate': 2},
        {'task': 'masked_pixels', 'mask_size': 2, 'model_args': {'chunk_size': 128, 'depth': 1}},
    ],
    ids=lambda changes: changes.get('task', changes.get('opt')),
)
def test_a_step_asks_the_device_nothing(tmp_path, changes):
    recipe = small(tmp_path / 'run', augmentation='torch', stages=((16, 1.0),), batch_size=20, **changes)
    data = TrainingData(recipe, Processes(torch.device('cpu')))
    learner = Learner(recipe, data.shape, 16, 16, 10, data.mean, data.std, data.processes)
    learner.start('bf16')
    learner.task.train()
    finite, batches = FiniteCheck(torch.device('cpu'), 0), data.stream(0, 16)
    for step in range(2):  # the first one makes what is made once
        known = [state['step'] for state in learner.optimizer.state.values() if 'step' in state]
        with Questions(known) as questions:
            images, labels = next(batches)
            if recipe.augment.mixes:
                images, labels = data.mixup(images, labels)
            loss, grad_norm, _ = learner.update(images, labels, 0.5, step)
            finite.note(loss, grad_norm)
    assert questions.asked == []
    score = evaluate
    if recipe.task == 'masked_pixels':
        score = lambda *args: evaluate_masked(*args[:3], 0.5, 2, args[3])  # noqa: E731
    with Questions() as questions:
        scores = score(learner.model, data.test, 16, 'fp32')
    assert scores['num_samples'] == 100 and len(questions.asked) <= 4  # the sums, at the end


def test_evaluation_gives_the_mean_over_the_images_that_count():
    """Against PyTorch's own loss and a count in Python, with images that could not be read."""
    from linvision.data import Augmentation, create_batches
    from linvision.data.datasets import create_dataset

    images = create_dataset('fake', '', 'test')
    batches = create_batches(images, 32, (0.5,), (0.5,), torch.device('cpu'), Augmentation())
    x = torch.cat([image for image, _ in batches.ordered(16)])
    labels = images.labels.clone()
    labels[::7] = -1
    batches.labels = labels
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))
    scores = evaluate(model, batches, 16)
    logits, told = model(x).detach()[labels >= 0], labels[labels >= 0]
    assert scores['num_samples'] == len(told) and scores['num_left_out'] == 100 - len(told)
    assert scores['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, told).item(), rel=1e-5)
    assert scores['top1'] == sum(int(row.argmax()) == label for row, label in zip(logits, told, strict=True)) / len(
        told
    )
    five = sum(int(label) in row.topk(5).indices for row, label in zip(logits, told, strict=True))
    assert scores['top5'] == five / len(told)
