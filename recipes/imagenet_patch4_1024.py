"""ImageNet-1k at 1024×1024 in patches of 4×4 pixels: 65,536 tokens, from the weights of `imagenet_patch4`.

    torchrun --nproc-per-node 8 -m linvision train imagenet_patch4_1024 --data-dir /data/imagenet \\
      --init outputs/imagenet_patch4_base/model --output-dir outputs/imagenet_patch4_1024

Result: not yet run. `--init` takes a base model, as `recipes/imagenet_patch4.py --model linformer_vit_base_patch4_224`
leaves it; its projections and positions are resized. Images smaller than 1024 are enlarged.
"""

from pathlib import Path

from imagenet_patch16 import RECIPE as PATCH16
from linvision.train import main

RECIPE = PATCH16.replace(
    model='linformer_vit_base_patch4_1024',
    model_args={},
    output_dir=Path('outputs/imagenet_patch4_1024'),
    epochs=10,
    stages=((512, 0.5), (1024, 0.5)),
    batch_size=256,
    accumulate=8,
    lr=1e-4,
    layer_decay=0.75,
    crop_scale=(0.3, 1.0),
)

if __name__ == '__main__':
    main(RECIPE, __doc__)
