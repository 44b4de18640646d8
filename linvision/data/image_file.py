"""Reading an image file, the same way in training, evaluation and prediction (streams are decoded by timm).

A photograph is turned upright as its EXIF data says; what is transparent lies on white; 16-bit grey keeps its upper 8
bits.
"""

import os
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

WHOLE = ('border', 'squash')  # crop modes that take all of an image that is not square; of others the middle is used
SUFFIXES = (*IMG_EXTENSIONS, '.gif')
MODES = {1: 'L', 3: 'RGB'}  # PIL's name of an image with so many channels
LONG = 16  # times its height, or its width: more of an image is not resized to have all but its middle cut off
DETAIL = 4  # so that a crop of a sixteenth of the image is not yet enlarged
# what PIL raises for a damaged file, or for damaged EXIF data in it
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, KeyError, struct.error, Image.DecompressionBombError)


def read_image(source: Any, in_chans: int, name: str | Path = '', smallest: int = 0) -> Image.Image:
    """An image with 1 (grey) or 3 (RGB) channels, 8 bits each.

    Args:
        source: Path or binary file.
        in_chans: Channels.
        name: What an error calls it; its path.
        smallest: A JPEG may be decoded at a fraction of its size, with sides of at least this (0: at its own).

    Raises:
        OSError: It cannot be read as an image; the message names it.
    """
    try:
        with opened(source) as file:
            if smallest:
                file.draft(None, (smallest, smallest))
            image: Image.Image = file
            if image.mode == 'I' and image.format == 'PPM':  # 16 bits, which PIL keeps in 32
                image = image.point(lambda value: value / 256).convert('L')
            return eight_bits(ImageOps.exif_transpose(image)).convert(MODES[in_chans])
    except UNREADABLE as error:
        reason = type(error).__name__ if str(source) in str(error) else f'{type(error).__name__}: {error}'
        raise OSError(f'{name or source} cannot be read as an image ({reason}).') from error


def opened(source: Any) -> Image.Image:
    """An image file, of which the header is read.

    Raises:
        OSError: It is a pipe, a device or a socket, which would be waited for without end; or PIL cannot open it.
    """
    if isinstance(source, str | os.PathLike) and not stat.S_ISREG(os.stat(source).st_mode):
        raise OSError('it is no regular file')
    return Image.open(source)


def upright_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image as `read_image` gives it, by its header.

    Raises:
        OSError: And all else in `UNREADABLE`, where it cannot be read.
    """
    with opened(path) as image:
        if image.format == 'TIFF' or (image.format == 'PNG' and 'exif' not in image.info):
            return image.size[::-1]  # PIL has turned the first; the second it would decode to look for EXIF
        lies = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # a photograph that is turned by a quarter
        return image.size if lies else image.size[::-1]


def eight_bits(image: Image.Image) -> Image.Image:
    """An image without transparency, 8 bits a channel.

    Raises:
        ValueError: It holds whole or real numbers of 32 bits, whose range nobody knows.
    """
    if image.mode in ('I', 'F'):
        raise ValueError(f'its values have 32 bits (mode {image.mode}); save it with 8 or 16 bits a channel')
    if image.mode.startswith('I;16'):  # PIL would cut off all above 255
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    drawn = image.convert('RGBA')
    white = Image.new('RGBA', drawn.size, 'white')
    white.alpha_composite(drawn)
    return white


def is_grey(mode: str) -> bool:
    """Whether images of a PIL mode have no colour."""
    return mode in ('1', 'L', 'LA') or mode.startswith('I')


def middle(image: Image.Image) -> Image.Image:
    """The middle of a long, thin image, `LONG` times as long as it is wide; any other image as it is.

    Where the middle square of an image is wanted, the whole would else be enlarged until its shorter side has the size.
    """
    most = LONG * min(image.size)
    left, top = (max(0, side - most) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def squared(image: Image.Image, crop_mode: str, fill: tuple[int, ...], size: int) -> Image.Image:
    """An image for training as timm's crop modes have it in evaluation; what is square stays as it is.

    The square has at most `DETAIL` times the size that is trained at: a long, thin image would else need many times its
    own memory.

    Args:
        image: The image.
        crop_mode: 'center' (the middle square is cut out later: see `middle`), 'border' (filled up to a square) or
            'squash' (stretched to one).
        fill: Colour of the border.
        size: Size of the images that are trained on.
    """
    longest = max(image.size)
    if crop_mode not in WHOLE or min(image.size) == longest:
        return middle(image)
    side = min(longest, DETAIL * size)
    if crop_mode == 'squash':
        return image.resize((side, side), Image.Resampling.BICUBIC)
    return ImageOps.pad(image, (side, side), color=fill if len(fill) > 1 else fill[0])
