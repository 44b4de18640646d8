"""Pathfinder images: what is fixed, what is drawn at random, and what the label may not be told from."""

import math
import pickle

import numpy as np
import pytest
import torch
from runs import PROCESSES

from linvision.data import create_dataset
from linvision.data.pathfinder import SIZES, draw
from linvision.train import Recipe
from linvision.train.data import TrainingData
from linvision.train.parallel import Processes
from scripts.studies import pathfinder as leaks

EDGE = 1.5  # pixels: places are rounded down to pixels before distances are kept


def images(split='train', **arguments):
    return create_dataset('pathfinder', arguments.pop('root', ''), split, **arguments)


def picture(number):
    return np.asarray(images()[number][0]).tobytes()


def points(dashes, n=20):
    """Points along dashes, (dashes, n, 2), in float64."""
    ends = torch.tensor(dashes, dtype=torch.float64)  # (dashes, 2, 2)
    share = torch.linspace(0, 1, n, dtype=torch.float64)[None, :, None]
    return ends[:, :1] * (1 - share) + ends[:, 1:] * share


@pytest.mark.parametrize('size', SIZES)
def test_image_i_is_the_same_in_any_order_and_subset(size):
    whole = images(img_size=size)
    part = whole.subset(torch.tensor([7, 2]))
    for position, number in ((1, 2), (0, 7), (1, 2)):
        (image, label), (other, same) = part[position], images(img_size=size)[number]
        assert image.size == (size, size) and image.mode == 'L'
        assert np.array_equal(np.asarray(image), np.asarray(other)) and label == same


def test_another_process_makes_the_same_images():
    with PROCESSES.Pool(1) as pool:
        assert pool.map(picture, [3, 4]) == [picture(3), picture(4)]


def test_seeds_splits_and_numbers_give_other_images():
    one, two, three, four = (
        np.asarray(of[i][0]) for of, i in ((images(), 0), (images(seed=1), 0), (images('test'), 0), (images(), 1))
    )
    assert len({x.tobytes() for x in (one, two, three, four)}) == 4


def test_labels_balance_in_every_pair_and_in_random_order():
    labels = torch.tensor([images().label(i) for i in range(4000)]).view(-1, 2)
    assert torch.equal(labels.sum(1), torch.ones(2000, dtype=torch.int64))
    assert abs(labels[:, 0].double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(2000)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('length', [6, 14])
def test_paths_are_whole_inside_and_apart(size, length):
    of, figures = images(img_size=size, contour_length=length), SIZES[size]
    for number in range(4):
        scene = of.scene(number)
        assert [len(path) for path in scene.paths] == [length, length]
        assert {len(path) for path in scene.distractors} <= {length // 3}
        starts = [path[0][0] for path in scene.paths]
        assert math.dist(*starts) == pytest.approx(figures.seed_distance)
        for path in (*scene.paths, *scene.distractors):
            gaps = [math.dist(a[1], b[0]) for a, b in zip(path, path[1:], strict=False)]
            assert gaps == pytest.approx([gaps[0]] * len(gaps)) and round(gaps[0]) in figures.margins
            assert [math.dist(*dash) for dash in path] == pytest.approx([figures.dash] * len(path))
        every = [points(path) for path in (*scene.paths, *scene.distractors)]
        assert all(0 <= path.min() and path.max() <= size for path in every)
        margin = round(math.dist(scene.paths[0][0][1], scene.paths[0][1][0]))
        for i, path in enumerate(every):
            for other in every[:i]:
                assert torch.cdist(path.flatten(0, 1), other.flatten(0, 1)).min() > margin - EDGE
            for j in range(len(path) - 2):  # a dash and those after its neighbour
                assert torch.cdist(path[j], path[j + 2 :].flatten(0, 1)).min() > margin - EDGE


@pytest.mark.parametrize('size', SIZES)
def test_the_label_says_whether_the_markers_are_on_one_path(size):
    of = images(img_size=size)
    for number in range(6):
        image, label = of[number]
        scene, pixels = of.scene(number), np.asarray(image)
        ends = [{path[0][0], path[-1][1]} for path in scene.paths]
        marked = set(scene.marked(label))
        assert (marked in ends) == bool(label) and len(marked) == 2
        plain = np.asarray(images(img_size=size, markers=False)[number][0])
        y, x = np.nonzero(pixels != plain)  # what the markers changed lies under them, and they are white
        far = [min(math.dist((a + 0.5, b + 0.5), end) for end in marked) for a, b in zip(x, y, strict=True)]
        assert max(far) < SIZES[size].marker_radius + 1.5
        assert all(pixels[int(b), int(a)] == 255 for a, b in marked)


def test_both_labels_are_rejected_equally_often_and_equally_long_and_bright():
    of, n = images(), 200
    labels = np.array([of.label(i) for i in range(n)])
    scenes = [of.scene(i) for i in range(n)]
    measures = {
        'rejected': [scene.rejected for scene in scenes],
        'dashes': [sum(map(len, (*scene.paths, *scene.distractors))) for scene in scenes],
        'brightness': [np.asarray(of[i][0]).mean() for i in range(n)],
        'white': [(np.asarray(of[i][0]) == 255).sum() for i in range(n)],
    }
    for name, values in measures.items():
        one, two = np.array(values)[labels == 1], np.array(values)[labels == 0]
        error = math.sqrt(one.var() / len(one) + two.var() / len(two))
        assert abs(one.mean() - two.mean()) <= 4 * error, name


def test_images_without_markers_do_not_depend_on_the_label():
    of = images(markers=False)
    for number in range(3):
        scene = of.scene(number)
        both = [np.asarray(draw(scene, label, 32, markers=False)) for label in (0, 1)]
        assert np.array_equal(*both) and np.array_equal(both[0], np.asarray(of[number][0]))


def test_a_cache_gives_the_same_images_and_makes_each_once(tmp_path, monkeypatch):
    arguments = {'root': tmp_path, 'num_images': 32, 'cache': True}
    kept, made = images(**arguments), images(num_images=32)
    assert len(kept) == 32 and len(images('test', **arguments)) == 4
    for _ in range(2):
        assert all(np.array_equal(np.asarray(kept[i][0]), np.asarray(made[i][0])) for i in (0, 5))
        kept = pickle.loads(pickle.dumps(kept))  # as a worker gets it
        monkeypatch.setattr(type(kept), 'draw', lambda *_: pytest.fail('made twice'))
        made = images(root=tmp_path, num_images=32, cache=True)
    more = images(root=tmp_path, num_images=48, cache=True)  # the first are the same
    assert np.array_equal(np.asarray(more[5][0]), np.asarray(made[5][0]))


def test_nothing_is_written_before_an_image_is_made_or_where_nothing_may_be(tmp_path):
    images(root=tmp_path, cache=True)
    images(root=tmp_path, cache=True, download=False)[0]
    assert not list(tmp_path.iterdir())


def test_evaluation_sees_whole_images_whatever_the_model(tmp_path):
    recipe = Recipe().replace(
        model='linformer_vit_pico_patch1_256', dataset='pathfinder', data_dir=tmp_path, batch_size=2
    )
    recipe = recipe.replace(dataset_args={'img_size': 256, 'num_images': 16})
    data = TrainingData(recipe, Processes(torch.device('cpu')))
    (pixels, _), *_ = data.test.ordered(256)
    drawn = torch.from_numpy(np.stack([np.asarray(images('test', img_size=256)[i][0]) for i in range(2)]))
    found = (pixels * data.std[0] + data.mean[0]) * 255
    torch.testing.assert_close(found[:, 0], drawn.float(), atol=0.01, rtol=0)
    assert data.data_config()['crop_pct'] == 1.0


def test_images_have_their_own_size_whatever_the_model(tmp_path):
    recipe = Recipe().replace(
        model='linformer_vit_pico_patch1_32', dataset='pathfinder', data_dir=tmp_path, batch_size=2
    )
    recipe = recipe.replace(dataset_args={'img_size': 64, 'num_images': 16})
    assert TrainingData(recipe, Processes(torch.device('cpu'))).stages == ((64, 1.0),)


def test_the_geometry_is_the_same_on_every_machine():
    x, y = images().scene(0).paths[0][0][0]
    assert (x, y) == pytest.approx((8.50259446, 11.73901072), abs=1e-6)


@pytest.mark.parametrize(
    'arguments, words',
    [
        ({'img_size': 48}, 'sizes 32, 64, 128, 256, got img_size=48'),
        ({'contour_length': 7}, '6, 9 and 14 dashes, got contour_length=7'),
        ({'num_images': 100}, 'multiple of 16.*got 100. The nearest is 96'),
        ({'lenght': 6}, "does not take 'lenght'"),
    ],
)
def test_what_there_is_not_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        images(**arguments)


def test_the_leak_detectors_find_a_leak_where_there_is_one():
    torch.manual_seed(0)
    labels = torch.arange(600) % 2
    pixels = torch.randint(0, 200, (600, 8, 8)).add(5 * labels.view(-1, 1, 1)).to(torch.uint8)
    x = leaks.features(pixels)
    assert x[:, 0].tolist() == pytest.approx((pixels.double() / 255).mean((1, 2)).tolist(), rel=1e-5)
    assert leaks.linear_score(x[:400], labels[:400], x[400:], labels[400:]) > 0.65
    noise = torch.randn(600, 4)
    assert 0.35 < leaks.linear_score(noise[:400], labels[:400], noise[400:], labels[400:]) < 0.65
    far = labels + torch.rand(600)
    assert leaks.histogram_score(far[:400], labels[:400], far[400:], labels[400:]) > 0.95
    pixels = pixels // 2 + (80 * labels).view(-1, 1, 1).to(torch.uint8)
    assert leaks.cnn_score(pixels[:400], labels[:400], pixels[400:], labels[400:], 20) > 0.9
    assert sum(p.numel() for p in leaks.small_cnn().parameters()) == 208_498
