"""Random numbers and permutations as pure functions of their arguments: a counter-based hash and a keyed bijection.

Everything here is integer arithmetic modulo 2**64 and one correctly rounded square root, so the numbers are the same
with every version of every library on every machine. A golden test holds them.
"""

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the increment of splitmix64
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_U64 = np.uint64
_ROUNDS = 8
_SMALL = 1024  # permutations of fewer values go through the network twice: tiny halves mix slowly
_TAG_UNIFORM = 1  # separates these numbers from the keys of the order, which have their own tags


def _mix(values: np.ndarray) -> np.ndarray:
    """Apply the finaliser of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    values = values ^ (values >> _U64(30))
    values *= _MIX_1
    values ^= values >> _U64(27)
    values *= _MIX_2
    values ^= values >> _U64(31)
    return values


def _to_uint64(value: int | np.ndarray) -> np.ndarray:
    """Convert an integer of any size (modulo 2**64) or an array of integers to uint64 with at least one axis."""
    return np.atleast_1d(value & _MASK if isinstance(value, int) else value).astype(_U64)


def derive_key(seed: int, *parts: int | np.ndarray) -> np.ndarray:
    """Hash a seed and further integers into keys.

    ``parts`` are integers or integer arrays that broadcast against one another. Returns uint64 of their common shape,
    with at least one axis.
    """
    key = _mix(_to_uint64(seed) + _U64(_GOLDEN))
    for part in parts:
        key = _mix((key ^ _to_uint64(part)) * _U64(_GOLDEN) + _U64(_GOLDEN))
    return key


def uniform(seed: int, positions: np.ndarray, draws: int) -> np.ndarray:
    """Return random numbers for augmentation: a hash of (seed, position, draw), for a whole batch at once.

    ``positions``: integers, shape (n,). Returns float32 (n, draws) in [0, 1), multiples of 2**-24.
    """
    keys = derive_key(seed, _TAG_UNIFORM, np.asarray(positions)[:, None])
    numbers = _mix(keys + np.arange(1, draws + 1, dtype=_U64) * _U64(_GOLDEN))
    return (numbers >> _U64(40)).astype(np.float32) * np.float32(2.0**-24)


def permute(values: np.ndarray, size: int | np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """Map each of ``values`` by a keyed bijection of ``range(size)``, each independently of the others.

    ``values``: integers (n,), each in ``range(size)``; ``size`` (up to 2**62) and ``key``: one integer for all, or an
    array with one for each value. Returns int64 (n,).

    The bijection is a generalised Feistel network (Black and Rogaway 2002, "Ciphers with arbitrary finite domains",
    method 3). A value is a pair (left, right) of ``range(a) x range(b)``, where a is the rounded-up square root of the
    size and b the smallest number with ``a * b >= size``. Each round adds a keyed hash of one half to the other, modulo
    its range. The few results beyond ``size`` (fewer than a) go through the network again until they are inside.
    """
    sizes, keys, result = _to_uint64(size), _to_uint64(key), _to_uint64(values)
    result = _walk(result, sizes, keys)
    small = np.broadcast_to(sizes < _SMALL, result.shape)
    if small.any():
        result[small] = _walk(result[small], _at(sizes, small), ~_at(keys, small))
    return result.astype(np.int64)


def _walk(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    a = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(_U64)
    b = (sizes + a - _U64(1)) // a
    round_keys = _mix(keys + np.arange(1, _ROUNDS + 1, dtype=_U64)[:, None] * _U64(_GOLDEN))
    result = _feistel(values, a, b, round_keys)
    outside = np.flatnonzero(result >= sizes)
    while outside.size:
        walked = _feistel(result[outside], _at(a, outside), _at(b, outside), _at(round_keys, outside))
        result[outside] = walked
        outside = outside[walked >= _at(sizes, outside)]
    return result


def _at(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    return values if values.shape[-1] == 1 else values[..., where]


def _feistel(values: np.ndarray, a: np.ndarray, b: np.ndarray, round_keys: np.ndarray) -> np.ndarray:
    shift = _U64(32)
    left, right, left_range, right_range = values % a, values // a, a, b
    for round_key in round_keys:
        # A multiplicative hash of the right half: its top 32 bits, scaled, are a number of range(left_range).
        total = right + round_key
        total *= _MIX_1
        total ^= total >> shift
        total *= _MIX_2
        total >>= shift
        total *= left_range
        total >>= shift
        total += left
        # Modulo left_range: if the sum is below it, the difference wraps around to a huge number.
        np.minimum(total, total - left_range, out=total)
        left, right, left_range, right_range = right, total, right_range, left_range
    return left + right * a  # after an even number of rounds, the halves are back in place
