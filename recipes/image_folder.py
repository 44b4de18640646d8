"""A folder of your own images: classes, channels and sizes are found out.

    linvision train image_folder --data-dir MY_IMAGES --output-dir outputs/my_images
    linvision predict outputs/my_images SOME_IMAGE

`MY_IMAGES/train/CLASS/IMAGE` and `MY_IMAGES/val/CLASS/IMAGE`, or `MY_IMAGES/CLASS/IMAGE`, of which every fifth is then
the test. Images are read at their own size, at most 64×64 (4,096 tokens): `--img-size 128` takes another. What is not
square loses its sides; with `--native-sizes` all keep their shape.

Result: 49.6 % on 655 test pictures of Debian's clip art in ten classes, 64×64 pixels; softmax regression on them at
16×16 40.9 % (25 epochs in three stages on one CPU thread, bf16, torch 2.14.1, one seed, 2026-11-24; commands:
https://linvision.github.io/linvision/own_images/). Not yet run on a GPU.
"""

from pathlib import Path

from linvision.train import Augment, Data, Optim, Recipe, Run, main

RECIPE = Recipe(
    model='linformer_vit_pico_patch1_64',
    data=Data(dataset='image_folder', batch_size=32, workers=2),
    optim=Optim(opt='muon', lr=0.01),
    augment=Augment(crop_scale=(0.6, 1.0), hflip=0.5),
    run=Run(output_dir=Path('outputs/image_folder'), max_minutes=15, checkpoint_every=100),
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
