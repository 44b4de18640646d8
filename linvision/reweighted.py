"""A module with other weights, for one call: `torch.func.functional_call` for modules that several threads share.

`functional_call` puts the weights into the module itself and takes them out again: another thread would find them
there, or put back what it found.
"""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar('Module', bound=nn.Module)


def reweighted(module: Module, weights: Mapping[str, Tensor]) -> Module:
    """A module that shares everything with another but some parameters and buffers.

    Args:
        module: The module, which stays as it is.
        weights: What takes the place of its parameters and buffers, by name; of tied ones everywhere.
    """
    every = (*module.named_parameters(), *module.named_buffers())
    return copied(module, {id(tensor): weights[name] for name, tensor in every if name in weights})


def copied(module: Module, weights: Mapping[int, Tensor]) -> Module:
    """A copy of a module and of the modules in it, with other tensors by the identity of its own."""
    copy: Module = object.__new__(type(module))  # FSDP2 has a __new__ of its own, which calls __init__
    copy.__dict__ = {
        **module.__dict__,
        '_parameters': {name: weights.get(id(p), p) for name, p in module._parameters.items()},
        '_buffers': {name: weights.get(id(b), b) for name, b in module._buffers.items()},
        '_modules': {name: m and copied(m, weights) for name, m in module._modules.items()},
    }
    return copy
