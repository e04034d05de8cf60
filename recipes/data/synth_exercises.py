"""Small exercises with a correct reasoning: what the embedded sample in SYNTH's schema is made of.

Place in the path: synth_templates -> **synth_exercises** -> synth_sample -> assets/synth_sample.jsonl.

Invariants: an exercise follows from its draws alone; every equation in a reasoning is true; the statement says the
exercise and its result in a form that a program can check: `<kind>(<arguments>) = <result>`.

Example:
    KINDS["addition"](Draws("example"), "en").statement  # addition(4821, 307) = 5128
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from recipes.data.synth_templates import WEEKDAYS, YES_NO

_NAMES = ("Ada", "Bela", "Carl", "Dora", "Emil", "Frida", "Gina", "Hugo", "Ines", "Jonas", "Kira", "Leo")
_UNITS = (
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("kg", "g", 1000),
    ("h", "min", 60),
    ("min", "s", 60),
    ("l", "ml", 1000),
    ("t", "kg", 1000),
)


class Draws:
    """Whole numbers that follow from a name alone, the same with every version of Python."""

    def __init__(self, name: str) -> None:
        self._name, self._count = name, 0

    def between(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        self._count += 1
        digest = blake2b(f"{self._name}/{self._count}".encode(), digest_size=16).digest()
        return low + int.from_bytes(digest, "big") % (high - low + 1)

    def pick(self, choices: Sequence[Any]) -> Any:
        """One of the choices."""
        return choices[self.between(0, len(choices) - 1)]


class Exercise(NamedTuple):
    """What a kind of exercise yields: slots of the sentences, the checkable statement, the reasoning."""

    slots: dict[str, Any]
    statement: str
    reasoning: str


def _parts(number: int) -> list[int]:
    """Place values of a number, the largest first, zeros left out: 307 -> 300, 7."""
    digits = str(number)
    return [int(digit) * 10 ** (len(digits) - place) for place, digit in enumerate(digits, start=1) if digit != "0"]


def _addition(draws: Draws, _language: str) -> Exercise:
    a, b = draws.between(11, 9999), draws.between(11, 999)
    total, steps = a, []
    for part in _parts(b):
        steps.append(f"{total} + {part} = {total + part}")
        total += part
    reasoning = (
        f"I add {b} to {a} place by place. "
        + ". ".join(steps)
        + f". Check: {total} - {b} = {a}. So the sum is {total}."
    )
    return Exercise({"a": a, "b": b, "result": total}, f"addition({a}, {b}) = {total}", reasoning)


def _subtraction(draws: Draws, _language: str) -> Exercise:
    b, result = draws.between(11, 999), draws.between(1, 9000)
    a, rest, steps = b + result, b + result, []
    for part in _parts(b):
        steps.append(f"{rest} - {part} = {rest - part}")
        rest -= part
    reasoning = (
        f"I take {b} away from {a} place by place. "
        + ". ".join(steps)
        + f". Check: {rest} + {b} = {a}. The difference is {rest}."
    )
    return Exercise({"a": a, "b": b, "result": rest}, f"subtraction({a}, {b}) = {rest}", reasoning)


def _multiplication(draws: Draws, _language: str) -> Exercise:
    a, b = draws.between(12, 999), draws.between(3, 99)
    total, steps = 0, []
    for part in _parts(b):
        steps.append(f"{a} × {part} = {a * part}")
        if total:
            steps.append(f"{total} + {a * part} = {total + a * part}")
        total += a * part
    reasoning = (
        f"I split {b} into {' and '.join(map(str, _parts(b)))}. " + ". ".join(steps) + f". The product is {total}."
    )
    return Exercise({"a": a, "b": b, "result": total}, f"multiplication({a}, {b}) = {total}", reasoning)


def _division(draws: Draws, _language: str) -> Exercise:
    b, quotient = draws.between(3, 25), draws.between(4, 120)
    rest = draws.between(0, b - 1)
    a = b * quotient + rest
    reasoning = (
        f"The largest multiple of {b} that is not above {a} is {b} × {quotient} = {b * quotient}. "
        f"What is left: {a} - {b * quotient} = {rest}. {rest} is smaller than {b}, so the quotient is {quotient} "
        f"and the remainder {rest}."
    )
    return Exercise(
        {"a": a, "b": b, "result": quotient, "rest": rest}, f"division({a}, {b}) = {quotient}, {rest}", reasoning
    )


def _copying(draws: Draws, _language: str) -> Exercise:
    length = draws.between(3, 12)
    digits = str(draws.between(1, 9)) + "".join(str(draws.between(0, 9)) for _ in range(length - 1))
    text = draws.pick((digits, f"{digits[:2]}.{digits[2:]}", f"{digits[:2]}-{digits[2:]}", " ".join(digits)))
    spelled = " ".join(text.replace(" ", ""))
    reasoning = f"I give back the same characters in the same order: {spelled}. Nothing is to be changed."
    return Exercise({"text": text}, f"copying({text}) = {text}", reasoning)


def _date(draws: Draws, _language: str) -> Exercise:
    start = datetime.date(2000, 1, 1) + datetime.timedelta(days=draws.between(0, 12000))
    days = draws.between(3, 75)
    day, left, steps = start, days, []
    while True:
        following = (day.replace(day=1) + datetime.timedelta(days=32)).replace(day=1)
        to_next = (following - day).days
        if left < to_next:
            break
        left -= to_next
        steps.append(f"From {day} to {following} it is {to_next} days, which leaves {left}")
        day = following
    end = day + datetime.timedelta(days=left)
    steps.append(f"{left} days after {day} is {end}")
    reasoning = f"I count {days} days from {start}, month by month. " + ". ".join(steps) + f". The date is {end}."
    return Exercise({"start": start, "days": days, "end": end}, f"date({start}, {days}) = {end}", reasoning)


def _weekday(draws: Draws, language: str) -> Exercise:
    first, days = draws.between(0, 6), draws.between(8, 400)
    weeks, rest = divmod(days, 7)
    last = (first + rest) % 7
    names, english = WEEKDAYS[language], WEEKDAYS["en"]
    path = ", ".join(english[(first + step) % 7] for step in range(rest + 1))
    reasoning = (
        f"After 7 days the same weekday comes back. {weeks} × 7 = {7 * weeks} and {days} - {7 * weeks} = {rest}, "
        f"so I go {rest} days on from {english[first]}: {path}. It is {english[last]}."
    )
    return Exercise(
        {"day": names[first], "days": days, "result": names[last]}, f"weekday({first}, {days}) = {last}", reasoning
    )


def _units(draws: Draws, _language: str) -> Exercise:
    unit, target, factor = draws.pick(_UNITS)
    a = draws.between(2, 480)
    result = a * factor
    reasoning = (
        f"1 {unit} has {factor} {target}. So I multiply: {a} × {factor} = {result}. The result is {result} {target}."
    )
    slots = {"a": a, "unit": unit, "target": target, "result": result}
    return Exercise(slots, f"units({a}, {unit}, {target}) = {result}", reasoning)


def _divisibility(draws: Draws, language: str) -> Exercise:
    b, quotient = draws.between(3, 13), draws.between(7, 99)
    rest = draws.pick((0, draws.between(1, b - 1)))
    a = b * quotient + rest
    verdict = YES_NO[language][0 if rest == 0 else 1]
    end = "Nothing is left, so it is divisible." if rest == 0 else f"{rest} is left, so it is not divisible."
    reasoning = (
        f"I look for the largest multiple of {b} up to {a}: {b} × {quotient} = {b * quotient}. "
        f"{a} - {b * quotient} = {rest}. {end}"
    )
    stated = "yes" if rest == 0 else "no"
    return Exercise({"a": a, "b": b, "verdict": verdict}, f"divisibility({a}, {b}) = {stated}", reasoning)


def _ordering(draws: Draws, _language: str) -> Exercise:
    names = list(_NAMES)
    p, q, r = (names.pop(draws.between(0, len(names) - 1)) for _ in range(3))
    reasoning = (
        f"From old to young: {p} comes before {q}, and {q} comes before {r}. Together: {p}, {q}, {r}. "
        f"Nobody comes before {p}, so {p} is the oldest."
    )
    return Exercise({"p": p, "q": q, "r": r}, f"ordering({p} > {q}, {q} > {r}) = {p}", reasoning)


def _sorting(draws: Draws, _language: str) -> Exercise:
    numbers = [draws.between(1, 999) for _ in range(draws.between(3, 6))]
    ordered = sorted(numbers)
    steps = [f"The smallest of {', '.join(map(str, ordered[n:]))} is {ordered[n]}" for n in range(len(ordered) - 1)]
    reasoning = "I take the smallest number each time. " + ". ".join(steps) + f". The last one is {ordered[-1]}."
    listed, result = ", ".join(map(str, numbers)), ", ".join(map(str, ordered))
    return Exercise({"listed": listed, "sorted": result}, f"sorting({listed}) = {result}", reasoning)


def _sequence(draws: Draws, _language: str) -> Exercise:
    first, step, length = draws.between(1, 200), draws.between(2, 60), draws.between(4, 6)
    numbers = [first + step * n for n in range(length)]
    result = first + step * length
    gaps = ", ".join(f"{after} - {before} = {step}" for before, after in zip(numbers, numbers[1:], strict=False))
    reasoning = (
        f"I look at the differences: {gaps}. They are all {step}. The next number: {numbers[-1]} + {step} = {result}."
    )
    listed = ", ".join(map(str, numbers))
    return Exercise({"listed": listed, "result": result}, f"sequence({listed}) = {result}", reasoning)


KINDS: dict[str, Callable[[Draws, str], Exercise]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "multiplication": _multiplication,
    "division": _division,
    "copying": _copying,
    "date": _date,
    "weekday": _weekday,
    "units": _units,
    "divisibility": _divisibility,
    "ordering": _ordering,
    "sorting": _sorting,
    "sequence": _sequence,
}
