"""Every recipe is valid as it stands; and what a recipe asks for is seen in a step, against closed formulas."""

import importlib
from pathlib import Path

import pytest
import timm
import torch
from runs import small

from linvision.train import Recipe
from linvision.train.learner import Learner
from linvision.train.model import empty_model, resolved
from linvision.train.optimizer import create_schedule
from linvision.train.parallel import Processes

NAMES = sorted(
    p.stem for p in (Path(__file__).parents[1] / 'recipes').glob('*.py') if p.stem not in ('__init__', 'segment_pixels')
)
MADE_BY_COMMAND = 'outputs/converted'  # linvision convert


def recipe_of(name: str) -> Recipe:
    return importlib.import_module(name).RECIPE


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_is_valid_as_it_stands(name):
    recipe, left_behind = recipe_of(name), {str(recipe_of(other).run.output_dir) for other in NAMES}
    for weights in filter(None, (recipe.init, recipe.optim.teacher)):
        assert weights in {*left_behind, MADE_BY_COMMAND} or timm.is_model(weights), f'nothing makes {weights}'
    if recipe.init and not timm.is_model(recipe.init):  # another recipe comes first
        recipe = recipe.replace(init='', model=recipe.model or recipe_of('fashion_mnist_vit').model)
    recipe = resolved(recipe)
    recipe.validate()
    assert recipe.images_at_once(1) * recipe.data.accumulate == recipe.data.batch_size
    sizes = [size for size, _ in recipe.data.stages] or [recipe.data.img_size]
    for size in sizes:  # its model takes its arguments and has its sizes
        model = empty_model(recipe, {'in_chans': 3, 'num_classes': 10}, sizes[-1], size)
        assert not size or model.patch_embed.img_size == (size, size)


def test_a_model_or_data_set_that_does_not_exist_is_noticed():
    with pytest.raises(ValueError, match="model 'linformer_vit_pica_patch1_32'. Nearest: linformer_vit_pico_patch1_32"):
        recipe_of('fashion_mnist_pixels').replace(model='linformer_vit_pica_patch1_32').validate()
    with pytest.raises(ValueError, match="dataset 'fashion_minst'. Nearest: fashion_mnist"):
        recipe_of('fashion_mnist_pixels').replace(dataset='fashion_minst').validate()


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_is_the_same_after_a_checkpoint_has_held_it(name):
    recipe = recipe_of(name)
    flat = recipe.to_dict()
    assert Recipe.from_dict(flat) == recipe and {'lr', 'dataset', 'epochs', 'hflip', 'model'} <= flat.keys()
    assert recipe.replace(lr=7.0).optim == recipe.replace(optim=recipe.replace(lr=7.0).optim).optim
    assert recipe.replace(lr=7.0).replace(lr=recipe.optim.lr) == recipe


def test_an_unknown_field_lists_the_nearest():
    with pytest.raises(ValueError, match="Unknown field of a recipe 'batchsize'. Nearest: .*batch_size"):
        Recipe().replace(batchsize=3)


# ------------------------------------------------------------------------------------------------- what a step does


@pytest.fixture
def step(tmp_path):
    """One step of a recipe on a fixed batch: the parameters before and after by name, and what the step returned."""

    def run(progress: float = 0.5, **changes):
        settings = {'opt': 'momentum', 'sched': 'constant', 'warmup': 0.0, 'weight_decay': 0.0, 'lr': 0.1, **changes}
        recipe = small(tmp_path, stages=(), **settings)
        torch.manual_seed(0)
        shape = {'in_chans': 1, 'num_classes': 10}
        learner = Learner(recipe, shape, 16, 16, 100, (0.5,), (0.5,), Processes(torch.device('cpu')))
        learner.start('fp32')
        torch.manual_seed(1)
        images, labels = torch.randn(8, 1, 16, 16), torch.arange(8)
        before = {name: value.detach().clone() for name, value in learner.model.named_parameters()}
        returned = learner.update(images, labels, progress, 0)
        after = {name: value.detach().clone() for name, value in learner.model.named_parameters()}
        return before, after, (*returned, labels)

    return run


def moved(before, after):
    return torch.cat([(after[name] - before[name]).flatten() for name in before]).norm()


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.6])
def test_the_loss_has_the_label_smoothing(step, smoothing):
    _, _, (loss, _, logits, labels) = step(smoothing=smoothing)
    logp = logits.log_softmax(-1)
    expected = -(1 - smoothing) * logp[torch.arange(8), labels].mean() - smoothing * logp.mean()
    torch.testing.assert_close(loss, expected)
    if smoothing:
        assert (loss + logp[torch.arange(8), labels].mean()).abs() > 1e-3  # without, it would be another


@pytest.mark.parametrize('clip_grad', [0.0, 0.01, 0.5, 1e6])
def test_the_update_has_at_most_the_norm_that_the_gradient_is_clipped_to(step, clip_grad):
    before, after, (_, norm, *_) = step(clip_grad=clip_grad)
    assert norm > 0.5  # of the gradient before it is clipped
    expected = min(float(norm), clip_grad) if clip_grad else float(norm)
    assert float(moved(before, after)) == pytest.approx(0.1 * expected, rel=1e-3)  # of plain SGD: lr times the gradient


@pytest.mark.parametrize(
    'opt', ['momentum', 'adamw', 'muon']
)  # SGD adds the decay to the gradient, after it is clipped
def test_weight_decay_shrinks_the_matrices_and_nothing_else(step, opt):
    lr, decay = 0.1, 0.3
    before, without, _ = step(opt=opt, lr=lr)
    _, found, _ = step(opt=opt, lr=lr, weight_decay=decay)
    shrunk = {name for name in before if not torch.equal(found[name], without[name])}
    spared = ('projection', 'position', 'pos_embed', 'cls_token')
    assert shrunk == {n for n, p in before.items() if p.ndim > 1 and not n.startswith(spared) and p.any()}
    for name in shrunk:
        torch.testing.assert_close(found[name] - without[name], -lr * decay * before[name], rtol=1e-3, atol=1e-6)


def test_layer_decay_slows_each_layer_by_its_factor(step):
    before, plain, _ = step(clip_grad=0.0)
    _, slowed, _ = step(clip_grad=0.0, layer_decay=0.5)
    blocks = 1 + max(int(name.split('.')[1]) for name in before if name.startswith('blocks.'))
    for name, layers_above in [(f'blocks.{i}.attn.qkv.weight', blocks - i) for i in range(blocks)]:
        ratio = (slowed[name] - before[name]).norm() / (plain[name] - before[name]).norm()
        assert float(ratio) == pytest.approx(0.5**layers_above, rel=1e-3)


def test_the_step_has_the_rate_of_the_schedule(step):
    recipe = Recipe().replace(sched='cosine', warmup=0.2, lr=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.optim.lr)
    schedule = create_schedule(recipe.optim, optimizer, 100)
    for progress, expected in ((0.1, 0.05), (0.6, None)):
        schedule.step(round(100 * progress))
        rate = optimizer.param_groups[0]['lr']
        assert expected is None or rate == pytest.approx(expected, rel=0.02)
        before, after, (_, norm, *_) = step(progress, clip_grad=0.0, sched='cosine', warmup=0.2)
        assert float(moved(before, after)) == pytest.approx(rate * float(norm), rel=1e-3)


def test_accumulated_parts_are_the_whole_batch(step):
    before, whole, _ = step()
    _, parts, _ = step(accumulate=4)
    for name in before:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)
