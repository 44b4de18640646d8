"""Sets of small images that lie in folders: Tiny ImageNet, CIFAR as image files, ImageNet of 32×32 or 64×64 pixels.

Tiny ImageNet (cs231n, Stanford) has 100,000 training images of 64×64 pixels in 200 of ImageNet's classes; it is scored
on its 10,000 validation images, since those of its test have no labels. ImageNet scaled down is that of arXiv
1707.08819, as files. Each set is decoded once (`decoded.py`).
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from torchvision.datasets.utils import download_and_extract_archive

from linvision.data.decoded import decoded
from linvision.data.folders import ImageFiles, in_words, scan, visible
from linvision.data.image_set import ImageSet

TINY_IMAGENET = 'tiny-imagenet-200'  # as its archive names it
TINY_IMAGENET_URL = 'http://cs231n.stanford.edu/tiny-imagenet-200.zip'
TINY_IMAGENET_MD5 = '90528d7ca1a48142e341f4ef8d21d0de'
SIZES = {'imagenet32': 32, 'imagenet64': 64, 'tiny_imagenet': 64}  # of sets with WordNet ids
CIFAR_CLASSES = {  # as torchvision names and orders them
    'cifar10': tuple('airplane automobile bird cat deer dog frog horse ship truck'.split()),
    'cifar100': tuple(
        """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
        elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
        man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
        pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
        tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
        """.split()
    ),
}


def found(name: str, root: Path) -> Path | None:
    """The folder of a set of these below a root, or None.

    It has the set's name, or is the root itself; in it are `train/`, with a class of the set, and what is scored.
    """
    if name not in SIZES and name not in CIFAR_CLASSES:
        return None
    is_class = CIFAR_CLASSES[name].__contains__ if name in CIFAR_CLASSES else re.compile(r'n\d{8}').fullmatch
    for place in (name, *[TINY_IMAGENET] * (name == 'tiny_imagenet'), ''):
        folder = root / place
        classes = [path.name for path in visible(folder / 'train')]
        if any(map(is_class, classes)) and scored_folder(folder, name).is_dir():
            return folder
    return None


def scored_folder(folder: Path, name: str) -> Path:
    """Where the images are that a set is scored on."""
    return folder / ('test' if name in CIFAR_CLASSES else 'val')


def cifar_files(folder: Path, name: str, split: str, keep: bool) -> ImageSet | ImageFiles:
    """CIFAR-10 or CIFAR-100 as image files; its note says that they are.

    Raises:
        ValueError: A class is missing, or is none of CIFAR's.
    """
    classes = CIFAR_CLASSES[name]
    files = labelled(folder / split, folder, classes)
    if missing := set(classes) - {classes[label] for _, label in files.samples}:
        raise ValueError(f'{folder / split} lacks classes of {name}: {", ".join(sorted(missing)[:5])}.')
    endings = {Path(path).suffix.lower().strip('.').replace('jpg', 'jpeg') for path, _ in files.samples}
    return decoded(files, folder, split, 32, keep, f'{"/".join(sorted(endings)).upper()} copy')


def small_imagenet(name: str) -> Callable[[Path, str, bool], ImageSet | ImageFiles]:
    """Tiny ImageNet, fetched where it is missing, or all of ImageNet's classes at the size of a name of `SIZES`."""

    def load(root: Path, split: str, download: bool) -> ImageSet | ImageFiles:
        folder, reason = found(name, root), ''
        if folder is None and name == 'tiny_imagenet':
            reason = fetch_tiny_imagenet(root) if download else 'download is switched off, as in a dry run'
            folder = found(name, root)
        if folder is None:
            raise FileNotFoundError(missing(name, root, reason))
        classes, scored = tuple(path.name for path in visible(folder / 'train')), scored_folder(folder, name)
        if split == 'test' and (scored / 'images').is_dir():  # as Tiny ImageNet is unpacked
            files = annotated(scored / 'val_annotations.txt', classes)
        else:
            files = labelled(scored if split == 'test' else folder / 'train', folder, classes)
        return decoded(in_words(files), folder, split, SIZES[name], download)

    return load


def missing(name: str, root: Path, reason: str) -> str:
    """An error's words."""
    if name == 'tiny_imagenet':
        return (
            f'Tiny ImageNet is not in {root}, and could not be fetched ({reason}). Unpack tiny-imagenet-200.zip into '
            f'{root}, so that {root / TINY_IMAGENET} holds train/ and val/.'
        )
    return (
        f'{name} is not in {root}, and cannot be downloaded. Put images of {SIZES[name]}×{SIZES[name]} pixels into '
        f'{root / name}/train/n01440764/* … and {root / name}/val/n01440764/* …'
    )


def fetch_tiny_imagenet(root: Path) -> str:
    """Fetch Tiny ImageNet into a root, where it appears whole; what went wrong, in words."""
    part = root / f'{TINY_IMAGENET}.part'
    try:
        download_and_extract_archive(
            TINY_IMAGENET_URL, str(root), str(part), md5=TINY_IMAGENET_MD5, remove_finished=True
        )
        (part / TINY_IMAGENET).rename(root / TINY_IMAGENET)
    except (RuntimeError, OSError) as error:
        return str(error)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return 'the archive does not hold it'


def annotated(annotations: Path, classes: tuple[str, ...]) -> ImageFiles:
    """The images beside a file of their labels, whose lines begin with an image's name and its WordNet id.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has another line.
    """
    if not annotations.is_file():
        raise FileNotFoundError(f'{annotations} is missing: without it the images beside it have no labels.')
    label_of, samples = {name: label for label, name in enumerate(classes)}, []
    for line in annotations.read_text().splitlines():
        name, wordnet_id, *_ = [*line.split('\t'), '']
        if wordnet_id not in label_of or Path(name).name != name:
            raise ValueError(f'{annotations} has the line {line!r}: expected an image and one of {len(classes)} ids.')
        samples.append((label_of[wordnet_id], str(annotations.parent / 'images' / name)))
    return ImageFiles([(path, label) for label, path in sorted(samples)], classes)


def labelled(split_folder: Path, folder: Path, classes: tuple[str, ...]) -> ImageFiles:
    """The images in a folder of classes, RGB.

    Args:
        split_folder: Holds the class folders.
        folder: What holds that, for an error.
        classes: Names of the classes, by label.

    Raises:
        FileNotFoundError: There are no images.
        ValueError: There is a folder of another class.
    """
    images = scan(split_folder, folder, quiet=True)
    if odd := set(images) - set(classes):
        raise ValueError(f'{split_folder} has folders that are no class of this set: {sorted(odd)[:5]}.')
    return ImageFiles([(path, label) for label, c in enumerate(classes) for path in images.get(c, [])], classes)
