"""Random changes by each library: what they do, and that (seed, epoch, index) decides it."""

import pickle
from itertools import islice

import albumentations
import kornia
import pytest
import torch
import torch.nn.functional as F
from runs import CPU, image_set, save_folder
from torchvision.transforms import v2

from linvision.data import Augmentation, Batches, ImageSet, create_batches, create_dataset
from linvision.data.augmentation import LIBRARIES, TRANSFORMS
from linvision.data.loader_batches import KeyedImages, evaluation_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
ALL = {'crop_scale': (0.5, 1.0), 'shift': 2, 'hflip': 0.5, 'color_jitter': 0.3, 'erase': 0.5}
every_library = pytest.mark.parametrize('library', LIBRARIES)


def batches(images, augmentation: Augmentation, batch_size: int = 8, **where) -> Batches:
    n = images.in_chans
    return create_batches(images, batch_size, MEAN[:n], STD[:n], CPU, augmentation, **where)


def first(found: Batches, n: int = 1, step: int = 0, seed: int = 3, img_size: int = 12):
    """Images and labels of n batches from a step on, one after another."""
    images, labels = zip(*islice(found.stream(seed, step, img_size), n), strict=True)
    return torch.cat(images), torch.cat(labels)


def changed(images: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
    """uint8 images, changed as a training batch is, on the scale 0..255 and in their own order."""
    size, n = images.shape[-1], len(images)
    found = batches(ImageSet(images, torch.arange(n), ('a',) * n, size), augmentation, n)
    x, labels = first(found, img_size=size)
    mean, std = (torch.tensor(v[: images.shape[1]]).view(1, -1, 1, 1) for v in (MEAN, STD))
    return (255 * (x * std + mean))[labels.argsort()]


def noise(n: int, in_chans: int = 3, size: int = 12) -> torch.Tensor:
    return torch.randint(0, 256, (n, in_chans, size, size), dtype=torch.uint8)


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """The same 24 images of noise in memory and in files."""
    images = ImageSet(noise(24), torch.arange(24), tuple(f'{i:02}' for i in range(24)), 12)
    folder = tmp_path_factory.mktemp('noise')
    for split in ('train', 'val'):
        save_folder(images, folder / split)
    return {'memory': images, 'files': create_dataset('image_folder', folder, 'train')}


# ----------------------------------------------------------------------------------------------- what decides the draws


@every_library
@pytest.mark.parametrize('place', ['memory', 'files'])
def test_draws_depend_on_seed_epoch_and_index_alone(sets, library, place):
    augmentation = Augmentation(library, **ALL)
    images, labels = first(batches(sets[place], augmentation), 6)  # two epochs of three batches
    for workers in (1, 2):
        x, y = first(batches(sets[place], augmentation, workers=workers), 4, step=2)
        assert torch.equal(x, images[16:]) and torch.equal(y, labels[16:])
    for rank in (0, 1):
        x, y = first(batches(sets[place], augmentation, rank=rank, count=2, workers=rank), 6)
        assert torch.equal(x, images[rank::2]) and torch.equal(y, labels[rank::2])
    order = labels.unflatten(0, (2, 24)).argsort(dim=1)
    one, two = images[:24][order[0]], images[24:][order[1]]
    assert (one != two).flatten(1).any(dim=1).all()  # each image is changed otherwise in the next epoch
    x, y = first(batches(sets[place], augmentation), 3, seed=4)
    assert not torch.equal(y, labels[:24]) and (x[y.argsort()] != one).flatten(1).any(dim=1).all()


@pytest.mark.parametrize('library', TRANSFORMS)
def test_what_workers_do_can_be_sent_to_them(sets, library):
    """As Python does where it starts workers afresh instead of forking: on other systems, and from 3.14 on."""
    for transform in (TRANSFORMS[library](Augmentation(library, **ALL), 12, MEAN), evaluation_transform(MEAN, 12, 0.9)):
        images = KeyedImages(sets['files'], transform, seed=3)
        (x, label, _), (again, _, _) = images[1, 5], pickle.loads(pickle.dumps(images))[1, 5]
        assert torch.equal(x, again) and label == 5


def test_the_order_of_an_epoch_is_the_same_for_all_libraries(sets):
    orders = [first(batches(s, Augmentation(a, hflip=0.5)), 6)[1] for s in sets.values() for a in LIBRARIES]
    plain = first(batches(sets['memory'], Augmentation()), 6)[1]
    assert all(torch.equal(order, plain) for order in orders)


@every_library
def test_workers_do_not_repeat_one_another(library):
    same = ImageSet(noise(1, size=64).expand(32, -1, -1, -1).contiguous(), torch.arange(32), ('a',), 64)
    x, _ = first(batches(same, Augmentation(library, crop_scale=(0.3, 1.0)), workers=2), 4, img_size=64)
    assert len(x.flatten(1).unique(dim=0)) == 32


@every_library
def test_the_trainers_own_draws_are_what_they_were(sets, library):
    found = batches(sets['memory'], Augmentation(library, **ALL)).stream(0, 0, 12)
    state = torch.get_rng_state()
    next(found)
    assert torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------------------------- what happens to images


@every_library
@pytest.mark.parametrize('in_chans', [1, 3])
@pytest.mark.parametrize('workers', [0, 2])
def test_an_image_stays_with_its_label(library, in_chans, workers):
    augmentation = Augmentation(library, crop_scale=(0.5, 1.0), shift=1, hflip=0.5, erase=0.5)
    found = batches(image_set(side=12, img_size=12, in_chans=in_chans), augmentation, workers=workers)
    x, labels = first(found, 10)
    pixels = 255 * (x[:, 0] * STD[0] + MEAN[0])
    assert torch.equal(pixels.flatten(1).median(dim=1).values.round().long() - 1, labels)
    assert labels.bincount().tolist() == [2] * 40


@every_library
def test_what_is_normalised_agrees_with_the_three_libraries(library):
    images = noise(16)
    found = batches(ImageSet(images, torch.arange(16), ('a',) * 16, 12), Augmentation(library, hflip=1e-12), 16)
    x, labels = first(found)
    scaled = images[labels].float() / 255
    channels = images[labels].permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
    theirs = [albumentations.Normalize(MEAN, STD)(image=image)['image'] for image in channels]
    for expected in (
        v2.Normalize(MEAN, STD)(scaled),
        kornia.enhance.normalize(scaled, torch.tensor(MEAN), torch.tensor(STD)),
        torch.stack([torch.from_numpy(image) for image in theirs]).permute(0, 3, 1, 2),
    ):
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@every_library
@pytest.mark.parametrize('in_chans', [1, 3])
def test_values_stay_within_those_of_black_and_white(library, in_chans):
    some = {**ALL, 'color_jitter': ALL['color_jitter'] if in_chans == 3 else 0.0, 'rand_augment': 0}
    if library == 'torchvision' and in_chans == 3:
        some['rand_augment'] = 30
    x = changed(noise(64, in_chans), Augmentation(library, **some))
    assert -0.01 <= x.min() < 3 and 252 < x.max() <= 255.01


@every_library
def test_flips_are_mirror_images(library):
    images = noise(64)
    torch.testing.assert_close(changed(images, Augmentation(library, hflip=1.0)), images.flip(-1).float())
    x = changed(images, Augmentation(library, hflip=0.5)).round()
    mirrored = (x == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(x[~mirrored], images[~mirrored].float())
    assert 20 <= mirrored.sum() <= 44  # 32 ± 3 standard deviations


@every_library
def test_shifts_move_every_pixel_and_leave_a_border_of_the_mean(library):
    images = noise(128)
    x = changed(images, Augmentation(library, shift=2))
    fill = torch.tensor(MEAN).view(3, 1, 1) * 255
    seen = set()
    for image, out in zip(images, x, strict=True):
        padded = fill.expand(3, 16, 16).clone()
        padded[:, 2:14, 2:14] = image
        fits = [
            (dy, dx)
            for dy in range(5)
            for dx in range(5)
            if (padded[:, dy : dy + 12, dx : dx + 12] - out).abs().max() < 0.51  # the border may be uint8
        ]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) >= 23  # of 25, each missed with a chance of 0.5 %


@every_library
def test_crops_have_the_wanted_area_and_proportions(library):
    """Slopes tell how wide and how high a crop of a linear gradient was."""
    ramp = torch.linspace(0, 252, 64)
    image = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, torch.full((64, 64), 100.0)])
    images = image.round().to(torch.uint8).expand(64, -1, -1, -1).contiguous()
    x = changed(images, Augmentation(library, crop_scale=(0.2, 0.6)))
    width = (x[:, 0, 32, 56] - x[:, 0, 32, 8]) / (48 * 4)  # as shares of the image's
    height = (x[:, 1, 56, 32] - x[:, 1, 8, 32]) / (48 * 4)
    area, ratio = width * height, width / height
    assert 0.17 < area.min() < 0.26 and 0.54 < area.max() < 0.63
    assert 0.7 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.42
    torch.testing.assert_close(x[:, 2], torch.full((64, 64, 64), 100.0), rtol=0, atol=1)


@every_library
def test_colours_change_by_at_most_the_given_share(library):
    grey = torch.full((64, 3, 4, 4), 100, dtype=torch.uint8)  # has neither contrast nor saturation
    x = changed(grey, Augmentation(library, color_jitter=0.5))
    assert (x.std(dim=(1, 2, 3)) < 0.5).all()
    assert 48.9 < x.min() < 60 and 140 < x.max() < 151.1


@every_library
def test_erased_areas_are_zero_once_normalised(library):
    found = batches(ImageSet(torch.full((64, 3, 32, 32), 10, dtype=torch.uint8), torch.arange(64), ('a',), 32),
                    Augmentation(library, erase=1.0), 64)  # fmt: skip
    x, _ = first(found, img_size=32)
    lowest = (10 / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    erased = (x - lowest.view(3, 1, 1)).abs().amax(dim=1) > 0.1  # (B, H, W)
    assert x.permute(0, 2, 3, 1)[erased].abs().max() < 0.5 / 255 / min(STD) + 1e-6  # to the next uint8
    share = erased.float().mean(dim=(1, 2))
    assert 0.01 < share.min() < 0.1 and 0.25 < share.max() < 0.36
    for mask in erased:  # each is a rectangle
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()
    borders = changed(
        torch.full((64, 3, 8, 8), 10, dtype=torch.uint8), Augmentation(library, shift=3, color_jitter=1.0)
    )
    near = (borders / 255 - torch.tensor(MEAN).view(3, 1, 1)).abs().amax(1) < 0.01  # colours change before the border
    assert near[:, 0].all(1).any() and near[:, -1].all(1).any() and near[:, :, 0].all(1).any()


@every_library
@pytest.mark.parametrize('place', ['memory', 'files'])
def test_evaluation_is_never_augmented(sets, library, place):
    found = batches(sets[place], Augmentation(library, **ALL), 7)
    images, labels = (torch.cat(part) for part in zip(*found.ordered(12), strict=True))
    assert labels.tolist() == list(range(24))
    expected = v2.Normalize(MEAN, STD)(sets['memory'].images.float() / 255)
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)


@every_library
def test_a_smaller_stage_sees_the_same_changes_averaged(library):
    images = ImageSet(noise(8, size=16), torch.arange(8), ('a',) * 8, 16)
    large, small = (first(batches(images, Augmentation(library, **ALL)), img_size=size)[0] for size in (16, 8))
    torch.testing.assert_close(small, F.avg_pool2d(large, 2), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize('library', ['kornia', 'albumentations', 'torch'])
def test_rand_augment_is_torchvisions_alone(sets, library):
    with pytest.raises(ValueError, match=f"torchvision's alone, got augmentation '{library}'.*--augmentation torchvis"):
        batches(sets['memory'], Augmentation(library, rand_augment=9))


@pytest.mark.parametrize('change', [{'rand_augment': 9}, {'color_jitter': 0.4}])
def test_changes_of_colour_are_refused_for_grey_images(change):
    with pytest.raises(ValueError, match=r'1 channel\(s\): switch them off with --rand-augment 0 --color-jitter 0'):
        batches(image_set(), Augmentation('torchvision', **change))
