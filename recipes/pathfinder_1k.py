"""Pathfinder at 32×32 pixels, 1,024 tokens: do two markers lie on one dashed path?

    python recipes/pathfinder_1k.py --output-dir outputs/pathfinder_1k --workers 2

With self-pretraining by masked pixels on the same images (arXiv 2310.02980), which is what made plain attention work
here, first:

    python recipes/pathfinder_1k.py --task masked_pixels --output-dir outputs/pathfinder_1k_pixels --workers 2
    python recipes/pathfinder_1k.py --init outputs/pathfinder_1k_pixels --output-dir outputs/pathfinder_1k --workers 2

Images are made on the spot (`linvision/data/pathfinder.py`); `--dataset-args contour_length 6` is easier,
`--dataset-args cache True` keeps them in `--data-dir`. Scores are not comparable to the digit with those on LRA's
files, where Linformer has 76.3 and the Transformer 71.4 (arXiv 2011.04006).

Result: not yet run at full length, nor on a GPU.
"""

from pathlib import Path

from linvision.train import Recipe, main

RECIPE = Recipe(
    model='linformer_vit_tiny_patch1_32',
    dataset='pathfinder',
    output_dir=Path('outputs/pathfinder_1k'),
    epochs=50,
    batch_size=256,
    opt='muon',
    lr=0.005,
    weight_decay=0.01,
    augmentation='kornia',
    hflip=0.5,
    eval_every=5,
    workers=2,
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
