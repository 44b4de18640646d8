"""A plain ViT's conversion learns from the ViT itself: classes and the teacher's logits, on the teacher's own data.

    linvision convert outputs/vit --dataset fashion_mnist --proj-len 64 --output-dir outputs/converted
    linvision train distill_from_vit --init outputs/converted --teacher outputs/vit --output-dir outputs/distilled

Teacher and student share every weight at the start but E, and the head where the classes are the data's own; so a short
run with a small learning rate is enough to mend what the projection has cost (timm's logit distillation).

Result: from a teacher of 89.0 %, with `--epochs 0.5` 89.2 % at K = N/4 and, with `--lr 0.002` too, 88.8 % at K = N/16,
on all 10,000 test images of Fashion-MNIST, one seed (`python -m scripts.studies.run conversion`). Not yet run on a GPU.
"""

from pathlib import Path

from linvision.train import Augment, Data, Optim, Recipe, Run, main

RECIPE = Recipe(
    model='',  # that of `init`
    init='outputs/converted',
    data=Data(dataset='fashion_mnist', batch_size=32),
    optim=Optim(teacher='outputs/vit', teacher_weight=0.9, teacher_temperature=2.0, opt='adamw', lr=5e-4),
    augment=Augment(augmentation='kornia', hflip=0.5),
    run=Run(output_dir=Path('outputs/distilled'), epochs=1),
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
