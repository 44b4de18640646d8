"""PyTorch's distributed checkpoints, read so that a file can run no code.

The reader of `torch.distributed.checkpoint` unpickles `.metadata` as it is, and its planner whatever is no tensor: a
pickle runs what its writer wished. Here the first may name no classes but those below, as under torch's `weights_only`,
and the second is read under `weights_only` itself.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

ALLOWED = {  # what torch 2.11 to 2.14 write for a model, its moving average and its optimizer
    'torch': {'Size'},  # and dtypes
    'torch.serialization': {'_get_layout'},  # a layout by its name
    'torch.distributed.checkpoint.filesystem': {'_StorageInfo'},
    'torch.distributed.checkpoint.metadata': {
        'BytesStorageMetadata',
        'ChunkStorageMetadata',
        'Metadata',
        'MetadataIndex',
        'StorageMeta',
        'TensorProperties',
        'TensorStorageMetadata',
        '_MEM_FORMAT_ENCODING',
    },
    'pathlib': {'PosixPath'},
    'pathlib._local': {'PosixPath'},  # Python 3.13's name of it
}


class MetadataUnpickler(pickle.Unpickler):
    """An unpickler that knows the classes of a checkpoint's metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """A class by its name.

        Raises:
            UnpicklingError: It is none of those.
        """
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f'it asks for {module}.{name}, which could run code')
        return super().find_class('pathlib' if name == 'PosixPath' else module, name)


class ShardReader(dcp.FileSystemReader):
    """PyTorch's reader, but for how it reads `.metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the shards hold, by the one file that the first process wrote for all (`rank` is not looked at).

        Raises:
            OSError: The file is missing, or no metadata of a checkpoint; the message says why.
        """
        path = Path(self.path) / '.metadata'
        try:
            with path.open('rb') as file:
                metadata = MetadataUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f'it holds a {type(metadata).__name__}')
        except OSError:
            raise
        except Exception as error:  # whatever a damaged pickle makes of itself
            raise OSError(refusal(path, error)) from error
        if not isinstance(metadata.storage_meta, StorageMeta):
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class ShardPlanner(dcp.DefaultLoadPlanner):
    """PyTorch's planner, but for how it reads what is no tensor: numbers and names of the optimizer."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value in its place; what reaches torch's own unpickling is what we have written here.

        Raises:
            UnpicklingError: It holds more than plain values and tensors.
        """
        plain = io.BytesIO()
        torch.save(torch.load(value, map_location='cpu', weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def refusal(path: Path, error: Exception) -> str:
    """A sentence on a file that is not read, since it may hold code."""
    lines = (str(error) or type(error).__name__).splitlines()
    # torch names it in a line of many, others of which advise to load it all the same
    reason = next((line for line in lines if 'GLOBAL' in line), lines[0])
    return (
        f'{path} is not what a run writes, and was not loaded ({reason[:200]}). Nothing in it was run. Do not trust a '
        'checkpoint like that from someone else: remove its folder, and the same command goes on from the one before, '
        'or start over with --fresh.'
    )
