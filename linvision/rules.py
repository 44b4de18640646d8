"""What a value may be, as data: a rule in words and as a test, by the name of an argument or setting."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value may be: in words that follow 'must be', and as a test."""

    words: str
    holds: Callable[[Any], bool]


def is_whole(x: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether it is an integer in a range; True and False are none."""
    return isinstance(x, Integral) and not isinstance(x, bool) and low <= int(x) <= high


def is_number(x: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether it is a finite number in a range; True and False are none."""
    if not isinstance(x, Real) or isinstance(x, bool):
        return False
    try:
        value = float(x)
    except OverflowError:  # an integer of more than 308 digits
        return False
    return math.isfinite(value) and low <= value <= high


SIDE = 2**16  # pixels: an image of such sides has 4 thousand million of them
MANY = 2**20  # of what is counted: a square matrix of such a side has 4 TiB in fp32, more than memories hold
DEEP = 10_000  # layers: each is some modules of torch's, which take memory and time without any weight


def positive(most: int) -> Rule:
    """The rule of whole numbers from 1."""
    return Rule(f'a positive integer of at most {most:,}', partial(is_whole, low=1, high=most))


POSITIVE = positive(MANY)
COUNT = Rule(f'an integer of at least 0 and at most {MANY:,}', partial(is_whole, low=0, high=MANY))
RATE = Rule('a number from 0 to 1', partial(is_number, low=0, high=1))
FLAG = Rule('True or False', lambda x: isinstance(x, bool))


def at_least(low: int, high: float = math.inf) -> Rule:
    """The rule of whole numbers in a range."""
    most = '' if high == math.inf else f' and at most {high:,}'
    return Rule(f'at least {low}{most}', partial(is_whole, low=low, high=high))


def check(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raise ValueError for the first value that its rule does not hold for; names without a rule are not looked at."""
    for name, value in values.items():
        if name in rules and not rules[name].holds(value):
            raise ValueError(f'{name} must be {rules[name].words}, got {value!r}.')
