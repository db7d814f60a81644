"""Argument checks that name the parameter, its value and the rule."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real

__all__ = ["check_finite_float", "check_image_size", "check_integer", "check_option", "check_share"]


def check_finite_float(
    name: str,
    value: object,
    *,
    minimum: float = -math.inf,
    exclusive: bool = False,
) -> float:
    """Return ``value`` as a float, or say which rule it breaks.

    Args:
        name: Parameter name used in the error.
        value: Any real number.
        minimum: Smallest value allowed.
        exclusive: Whether ``minimum`` itself is refused.

    Raises:
        TypeError: If ``value`` is no real number.
        ValueError: If ``value`` is not finite or below ``minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        msg = f"{name} must be a real number, got {value!r} of type {type(value).__name__}"
        raise TypeError(msg)
    number = float(value)
    allowed = number > minimum if exclusive else number >= minimum
    if not math.isfinite(number) or not allowed:
        sign = ">" if exclusive else ">="
        bound = "" if minimum == -math.inf else f" and {sign} {minimum:g}"
        msg = f"{name} must be finite{bound}, got {value!r}"
        raise ValueError(msg)
    return number


def check_share(name: str, value: object, *, above_zero: bool = False, below_one: bool = False) -> float:
    """Return ``value`` as a float if it is in [0, 1].

    Args:
        name: Parameter name used in the error.
        value: Any real number.
        above_zero: Whether 0 is refused.
        below_one: Whether 1 is.

    Raises:
        TypeError: If it is no real number.
        ValueError: If it is outside.
    """
    share = check_finite_float(name, value, minimum=0, exclusive=above_zero)
    if share > 1 or (below_one and share == 1):
        msg = f"{name} must be in {'(' if above_zero else '['}0, 1{')' if below_one else ']'}, got {value!r}"
        raise ValueError(msg)
    return share


def check_integer(name: str, value: object, *, minimum: int) -> int:
    """Return ``value`` as an int of at least ``minimum``.

    Raises:
        TypeError: If ``value`` is no integer.
        ValueError: If ``value`` is below ``minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        msg = f"{name} must be an integer, got {value!r} of type {type(value).__name__}"
        raise TypeError(msg)
    if value < minimum:
        msg = f"{name} must be at least {minimum}, got {value!r}"
        raise ValueError(msg)
    return int(value)


def check_option(name: str, value: object, options: Collection[object]) -> None:
    """Refuse a ``value`` that is not among ``options``.

    Raises:
        ValueError: If it is not.
    """
    if value not in options:
        msg = f"{name} must be one of {', '.join(repr(option) for option in options)}, got {value!r}"
        raise ValueError(msg)


def check_image_size(name: str, value: object) -> tuple[int, int]:
    """Return a size in pixels as ``(height, width)``; one integer means a square.

    Raises:
        TypeError: If ``value`` is neither an integer nor a pair of integers.
        ValueError: If a side is below one pixel.
    """
    if isinstance(value, Integral):
        value = (value, value)
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        msg = f"{name} must be an integer or a pair (height, width), got {value!r}"
        raise TypeError(msg)
    height, width = (check_integer(f"{name}[{i}]", side, minimum=1) for i, side in enumerate(value))
    return height, width
