"""Exact numbers out of text: the answer that a completion states, and the arithmetic that a prompt asks for.

Plain functions over strings. Numbers are `fractions.Fraction`, so 0.1 + 0.2 equals 0.3. Nothing here evaluates code,
and nothing takes long on hostile text: digits, exponents and nesting are bounded.
"""

from __future__ import annotations

import re
from fractions import Fraction

MOST_DIGITS = 100  # a policy can write digits without end; a longer run is not taken for a number
DEEPEST_NESTING = 50  # parentheses and signs in an expression; keeps the recursive parser inside Python's stack

UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# A minus sign right after a word, a closing bracket or a unit is a subtraction or a hyphen: 12-7, (3)-7, covid-19.
SIGN = r"(?<![\w)\]}%])[-−]"
NUMBER = re.compile(
    rf"(?P<sign>(?:{SIGN})?)[$€£]?(?P<inner>(?<=[$€£])[-−])?"
    rf"(?<![0-9])(?P<digits>{UNSIGNED})(?P<exponent>[eE][-+]?[0-9]{{1,3}}(?![\w]))?"
    rf"(?:[ ]?/[ ]?(?P<denominator>{UNSIGNED}))?"
)
NUMERAL = re.compile(UNSIGNED)
PLUS_MINUS = {"+": 1, "-": -1, "−": -1}
TIMES_DIVIDE = {"*": 1, "×": 1, "·": 1, "x": 1, "X": 1, "/": -1, "÷": -1}
BLANKS = re.compile(r"[ \t]*")  # matches everywhere
HEADING = re.compile(r"[.:)][ \t]+\S")
BRACE = re.compile(r"\\boxed\{|\{|\}")
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{\s*([0-9.,]+)\s*\}\{\s*([0-9.,]+)\s*\}")


def stated_number(text: str) -> Fraction | None:
    r"""The number that a text gives as its answer, or None where it gives none.

    In this order: the number after the last `####` (the form of GSM8K, Cobbe et al. 2021), the content of the last
    `\boxed{}` (the form of MATH, Hendrycks et al. 2021), the last number of the text. Thousands separators, currency
    signs and a trailing period are read over; a percent sign is a unit, so 50% is 50; 3/4 is a fraction; 1e3 is 1000.
    """
    text = _without_latex(text)
    for start in reversed([match.end() for match in re.finditer("####", text)]):
        match = NUMBER.match(text, BLANKS.match(text, start).end())  # type: ignore[union-attr]
        # "#### 3. Add the parts" is a heading of Markdown, not an answer.
        if match and not HEADING.match(text, match.end()):
            return _value(match)
    boxed = _last_boxed(text)
    return _last_number(text if boxed is None else boxed)


def _last_number(text: str) -> Fraction | None:
    matches = list(NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


def _value(match: re.Match[str]) -> Fraction | None:
    """The exact value of a match of NUMBER; None where it has too many digits or divides by zero."""
    denominator = match["denominator"] or "1"
    if len(match["digits"]) > MOST_DIGITS or len(denominator) > MOST_DIGITS:
        return None
    value = Fraction(match["digits"].replace(",", "") + (match["exponent"] or ""))
    divisor = Fraction(denominator.replace(",", ""))
    if divisor == 0:
        return None
    return -value / divisor if match["sign"] or match["inner"] else value / divisor


def _without_latex(text: str) -> str:
    r"""\frac{1}{2} as 1/2, 1{,}000 and 1\,000 as 1000, \$ and \% without their backslash."""
    if "\\" not in text and "{," not in text:
        return text
    text = LATEX_FRACTION.sub(r"\1/\2", text)
    for written, plain in (("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\$", "$"), ("\\%", "%")):
        text = text.replace(written, plain)
    return text


def _last_boxed(text: str) -> str | None:
    r"""What stands inside the last closed \boxed{…}, braces balanced."""
    opened: list[tuple[int, bool]] = []  # braces not yet closed: where the content begins, and whether of a box
    best: tuple[int, int] | None = None
    for brace in BRACE.finditer(text):
        if brace[0] != "}":
            opened.append((brace.end(), brace[0] != "{"))
        elif opened:
            start, boxed = opened.pop()
            if boxed and (best is None or start > best[0]):
                best = (start, brace.start())
    return None if best is None else text[best[0] : best[1]]


class _NoExpressionError(Exception):
    """The text at this position is not an arithmetic expression."""


def last_expression(text: str) -> tuple[str, Fraction] | None:
    """The last arithmetic expression of a text with its exact value, or None where there is none.

    An expression has at least one of + - * / (also written − × · ÷, or x between numbers) between two numbers,
    parentheses and signs, and stays on one line. Products bind before sums; equals bind from the left.

    Raises:
        ZeroDivisionError: the last expression divides by zero.
    """
    found: tuple[str, Fraction | None] | None = None
    position = 0
    while position < len(text):
        if not _may_start(text, position):
            position += 1
            continue
        parser = _Parser(text, position)
        try:
            value = parser.sum(0)
        except _NoExpressionError:
            position += 1
            continue
        if parser.operators:
            found = (text[position : parser.end].strip(), value)
        position = max(parser.end, position + 1)
    if found is None:
        return None
    expression, value = found
    if value is None:
        raise ZeroDivisionError(expression)
    return expression, value


def _may_start(text: str, position: int) -> bool:
    before = text[position - 1] if position else " "
    return text[position] in "0123456789.(-−" and not (before.isalnum() or before in "_.")


class _Parser:
    """Recursive descent over one expression; a value of None stands for a division by zero inside it."""

    def __init__(self, text: str, start: int) -> None:
        self.text = text
        self.end = start  # just after what has been read
        self.operators = 0  # binary operators read

    def sum(self, depth: int) -> Fraction | None:
        total = self._product(depth)
        while (sign := self._operator(PLUS_MINUS)) is not None:
            start, operators = self.end, self.operators
            self._take(sign)
            try:
                term = self._product(depth)
            except _NoExpressionError:  # "3 + 4 - what?": the expression ends before this operator
                self.end, self.operators = start, operators
                break
            factor = PLUS_MINUS[self.text[sign]]
            total = None if total is None or term is None else total + factor * term
        return total

    def _product(self, depth: int) -> Fraction | None:
        total = self._factor(depth)
        while (sign := self._operator(TIMES_DIVIDE)) is not None:
            start, operators = self.end, self.operators
            self._take(sign)
            try:
                factor = self._factor(depth)
            except _NoExpressionError:
                self.end, self.operators = start, operators
                break
            if total is None or factor is None:
                total = None
            elif TIMES_DIVIDE[self.text[sign]] == 1:
                total *= factor
            else:
                total = None if factor == 0 else total / factor
        return total

    def _factor(self, depth: int) -> Fraction | None:
        if depth > DEEPEST_NESTING:
            raise _NoExpressionError
        position = self._after_blanks()
        character = self.text[position : position + 1]
        if character in ("-", "−"):
            self.end = position + 1
            value = self._factor(depth + 1)
            return None if value is None else -value
        if character == "(":
            self.end = position + 1
            value = self.sum(depth + 1)
            closing = self._after_blanks()
            if self.text[closing : closing + 1] != ")":
                raise _NoExpressionError
            self.end = closing + 1
            return value
        numeral = NUMERAL.match(self.text, position)
        if numeral is None or len(numeral[0]) > MOST_DIGITS:
            raise _NoExpressionError
        self.end = numeral.end()
        return Fraction(numeral[0].replace(",", ""))

    def _operator(self, kinds: dict[str, int]) -> int | None:
        position = self._after_blanks()
        return position if self.text[position : position + 1] in kinds else None

    def _take(self, sign: int) -> None:
        self.end = sign + 1
        self.operators += 1

    def _after_blanks(self) -> int:
        position = self.end
        while self.text[position : position + 1] in (" ", "\t"):
            position += 1
        return position
