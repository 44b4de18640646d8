"""The method; read `linformer_vit.py`, `block.py`, `attention.py`, `projection.py` and `projection_kinds.py`."""
