"""Random numbers that are a function of a key and a place, drawn on any device, in batches, and the same on each.

A generator's numbers depend on the device and on what was drawn before. Here each number is the SplitMix64 hash
(Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195) of its own place in the stream of a key.
"""

import torch
from torch import Tensor

STEP, FIRST, SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # as int64


def uniform(key: int, places: Tensor, n: int) -> Tensor:
    """Numbers from 0 to 1, without 1, of 24 bits: fp32 (B, n).

    Args:
        key: A seed of 63 bits, as `seed_of` gives.
        places: Which rows of the key's stream, (B), int64; each has numbers of its own. They are drawn on its device.
        n: Numbers a row, below 2³².
    """
    # int64 wraps around, as the hash wants; shifts must bring in zeros, and int64's bring in the sign
    bits = (places.unsqueeze(1) * 2**32 + torch.arange(1, n + 1, device=places.device)) * STEP + key
    bits = (bits ^ (bits >> 30 & 2**34 - 1)) * FIRST
    bits = (bits ^ (bits >> 27 & 2**37 - 1)) * SECOND
    bits = bits ^ (bits >> 31 & 2**33 - 1)
    return (bits >> 40 & 2**24 - 1).float() / 2**24
