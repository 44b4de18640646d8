"""ImageNet-1k in patches of 16×16 pixels: ViT-S/16's size, 196 tokens, K = 64.

    torchrun --nproc-per-node 8 -m linvision train imagenet_patch16 --data-dir /data/imagenet

from `train/` and `val/` folders, or from shards:

    … --dataset wds/imagenet --data-dir /data/shards --val-fraction 0 --dataset-args num_classes 1000 \\
      train_split 'imagenet1k-train-{0000..1023}.tar|1281167' test_split 'imagenet1k-validation-{00..63}.tar|50000'

Result: not yet run on ImageNet. To compare with: 76.5 % of a ViT-S/16 with full attention by this recipe, that of
"Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580), 90 epochs.
"""

from pathlib import Path

from linvision.train import Augment, Data, Optim, Recipe, Run, main

RECIPE = Recipe(
    model='linformer_vit_small_patch16_224',
    model_args={'class_token': False, 'global_pool': 'avg'},
    data=Data(dataset='imagenet', batch_size=1024, val_fraction=0.01, workers=12),
    optim=Optim(
        opt='adamw',
        lr=1e-3,
        weight_decay=0.1,  # times the learning rate, as timm's AdamW has it: the paper's 1e-4
        warmup=10_000 / 112_590,
        clip_grad=1.0,
    ),
    augment=Augment(crop_scale=(0.05, 1.0), hflip=0.5, rand_augment=10, mixup=0.2),
    run=Run(output_dir=Path('outputs/imagenet_patch16'), epochs=90, eval_every=5, checkpoint_every=1000),
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
