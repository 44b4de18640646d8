"""Pathfinder at 32×32 pixels, 1,024 tokens: do two markers lie on one dashed path?

    linvision train pathfinder_1k --output-dir outputs/pathfinder_1k

With self-pretraining by masked pixels on the same images (arXiv 2310.02980), which is what made plain attention work
here, first:

    linvision train pathfinder_1k --task masked_pixels --output-dir outputs/pathfinder_1k_pixels
    linvision train pathfinder_1k --init outputs/pathfinder_1k_pixels --output-dir outputs/pathfinder_1k

Images are made on the spot (`linvision/data/pathfinder.py`), some 200 a second on one core, and kept in `--data-dir`
(0.2 GB) for the epochs after the first. Paths have 14 dashes; `--dataset-args contour_length 6` is easier. Scores are
not comparable to the digit with those on LRA's files, where Linformer has 76.3 and the Transformer 71.4
(arXiv 2011.04006).

Result: none yet; not run at full length, nor on a GPU. On 6 dashes a small model leaves chance with two other norms and
without them does not begin (`recipes/pathfinder_1k_pico.py`, `docs/pathfinder.md`); here they are not tried:
`--model-args token_norm True head_norm True`, in one process.
"""

from pathlib import Path

from linvision.train import Augment, Data, Optim, Recipe, Run, main

RECIPE = Recipe(
    model='linformer_vit_tiny_patch1_32',
    data=Data(dataset='pathfinder', dataset_args={'cache': True}, batch_size=256, val_fraction=0.02, workers=8),
    optim=Optim(opt='muon', lr=0.005, weight_decay=0.01),
    augment=Augment(augmentation='kornia', hflip=0.5),
    run=Run(output_dir=Path('outputs/pathfinder_1k'), epochs=50, eval_every=5),
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
