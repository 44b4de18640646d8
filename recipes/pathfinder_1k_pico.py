"""Pathfinder at 32×32 pixels, 1,024 tokens, for one CPU core: paths of 6 dashes, and a model of 58,000 parameters.

    linvision train pathfinder_1k_pico --output-dir outputs/pathfinder_1k_pico

Each channel is normalised over the tokens of an image (`token_norm`), and the mean of the tokens over the images of a
batch (`head_norm`); docs/pathfinder.md says what the model does without. Coarse to fine: most of the time on images of
half the size, 256 tokens.

Result: 87.5 % on 8,000 test images, one seed (270,000 images in 40 minutes on one thread of a Xeon of 2.5 GHz, with
other jobs beside it, 2.4 GiB at most, torch 2.14.1, 2026-11-27; log in scripts/studies/results/; images of version 1,
before their seeds changed). The distance between the markers alone gives 71 %, a CNN 94 %. Not yet run on a GPU.
"""

from pathlib import Path

from linvision.train import main
from pathfinder_1k import RECIPE as PATHFINDER_1K

RECIPE = PATHFINDER_1K.replace(
    model='linformer_vit_pico_patch1_32',
    model_args={
        'embed_dim': 32,
        'local_size': 7,
        'local_grid': 16,
        'token_norm': True,
        'head_norm': True,
        'weight_init': 'jax',
    },
    dataset_args={**PATHFINDER_1K.data.dataset_args, 'contour_length': 6, 'num_images': 64_000},
    output_dir=Path('outputs/pathfinder_1k_pico'),
    max_minutes=40.0,
    stages=((16, 0.7), (32, 0.3)),
    batch_size=100,
    eval_every=1.0,
    precision='fp32',
    threads=1,
    workers=0,
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
