"""torch.hub.load('linvision/linvision', 'linformer_vit_pico_patch1_32', pretrained=True): every model by its name."""

dependencies = ['torch', 'torchvision', 'timm']

from linvision.models.registry import *  # noqa: E402, F403
