"""Keyed numbers: their definition, and that they are uniform."""

import torch

from linvision.data.keyed import uniform


def splitmix(state: int) -> int:
    """SplitMix64's output for a state, in whole numbers without bounds."""
    z = state % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_the_hash_gives_the_published_numbers():
    """Those of the reference implementation with seed 0, whose n-th state is n times the golden gamma."""
    assert [splitmix(n * 0x9E3779B97F4A7C15) for n in (1, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_numbers_are_those_of_the_hash():
    key = 2**63 - 12345
    found = uniform(key, torch.tensor([0, 3, 70_000]), 5)
    expected = [
        [(splitmix(key + (place * 2**32 + n) * 0x9E3779B97F4A7C15) >> 40) / 2**24 for n in range(1, 6)]
        for place in (0, 3, 70_000)
    ]
    assert found.tolist() == expected


def test_numbers_are_uniform_and_independent():
    x = uniform(7, torch.arange(2000), 50)
    assert 0 <= x.min() < 1e-4 and 1 - 1e-4 < x.max() < 1
    counts = (x * 20).long().flatten().bincount(minlength=20)
    assert ((counts - 5000).abs() < 4.5 * (5000 * 0.95) ** 0.5).all()
    apart = torch.corrcoef(x.T) - torch.eye(50)
    assert apart.abs().max() < 5 / 2000**0.5 and torch.corrcoef(x[:50])[0, 1:].abs().max() < 0.6
    assert (uniform(8, torch.arange(2000), 50) != x).float().mean() > 0.999
