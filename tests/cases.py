"""Which cases of a product are tested, where its axes have little to do with one another."""

import itertools


def pairs(first, second, *, whole=()):
    """Each of `first` with one of `second` in turn; those of `whole` with each of `second`.

    >>> pairs("abc", "xy", whole="a")
    [('a', 'x'), ('a', 'y'), ('b', 'y'), ('c', 'x')]
    """
    second = list(second)
    turns = zip(first, itertools.cycle(second))
    return [(one, each) for one, turn in turns for each in (second if one in whole else [turn])]
