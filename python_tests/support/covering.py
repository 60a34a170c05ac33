"""A pairwise covering set: every two values of two parameters meet in at least one case, in far fewer cases than all
combinations.
"""

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any


def _pairs(case: dict[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    for first, second in combinations(case, 2):
        yield first, case[first], second, case[second]


def pairwise(**choices: list[Any]) -> list[dict[str, Any]]:
    """Cases {name: value}, greedily: each begins with a pair not yet met, then gives every other parameter the value
    that meets most new pairs.

    The same choices give the same cases; of equally good values the one used least so far wins.
    """
    missing = {
        (first, a, second, b): None
        for first, second in combinations(choices, 2)
        for a, b in product(choices[first], choices[second])
    }  # a dict keeps the order
    used = {(name, value): 0 for name, values in choices.items() for value in values}
    cases = []
    while missing:
        first, a, second, b = next(iter(missing))
        case = {first: a, second: b}
        for name in sorted((name for name in choices if name not in case), key=lambda name: -len(choices[name])):

            def gain(value: Any, name: str = name, case: dict[str, Any] = case) -> tuple[int, int]:
                ordered = {key: value if key == name else case[key] for key in choices if key == name or key in case}
                return sum(pair in missing for pair in _pairs(ordered)), -used[name, value]

            case[name] = max(choices[name], key=gain)
        case = {name: case[name] for name in choices}
        for pair in _pairs(case):
            missing.pop(pair, None)
        for item in case.items():
            used[item] += 1
        cases.append(case)
    return cases


def case_id(case: dict[str, Any]) -> str:
    """The case as a test's id: "M=3-K=65-float16"."""
    return "-".join(
        str(value).removeprefix("torch.") if isinstance(value, str) or "torch." in str(value) else f"{name}={value}"
        for name, value in case.items()
    )
