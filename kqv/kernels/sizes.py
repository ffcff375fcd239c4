"""Sizes that kernels and recorded steps are made for."""


def power_of_two(number):
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
