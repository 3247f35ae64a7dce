"""Numbers and arithmetic out of text, against Python's own Fraction arithmetic."""

from __future__ import annotations

import ast
import operator
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.rewards.numeric import last_expression, stated_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("The answer is 72.", 72),
        ("12 + 7 = 19", 19),
        ("-72", -72),
        ("−72", -72),
        ("it is -7", -7),
        ("12-7", 7),  # a subtraction, not -7
        ("x=-3", -3),
        ("$1,234.50", Fraction("1234.5")),
        ("-$5 and $-6", -6),
        ("50%", 50),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        (".5", Fraction(1, 2)),
        ("1,000,000 apples", 1_000_000),
        ("1, 2, 3", 3),
        ("1,2,3", 3),
        ("1e3", 1000),
        ("1e-05", Fraction(1, 100_000)),
        ("no number", None),
        ("", None),
        ("5/0", None),
        ("٣", None),  # a digit of another script
    ],
)
def test_last_number(text: str, number: Fraction | int | None) -> None:
    assert stated_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = <<48/2=24>>24 clips\n#### 72", 72),
        ("#### 72\nand then 5 more", 72),
        ("#### $1,050", 1050),
        ("####72.", 72),
        ("#### -3.5 metres", Fraction("-3.5")),
        ("#### 1\n#### 2", 2),
        ("#### 7 and \\boxed{8}", 7),
        ("#### Step 1: add\nso 9", 9),  # headings of Markdown are no answers
        ("#### 3. Add the parts\nso 9", 9),
        ("#### 13. Add the parts\nso 9", 9),
        ("so \\boxed{72} from 5 and 6", 72),
        ("\\boxed{1} \\boxed{2} 3", 2),
        ("\\boxed{\\frac{1}{2}} or 3", Fraction(1, 2)),
        ("\\boxed{x = {4}} 5", 4),
        ("\\boxed{1{,}000}", 1000),
        ("\\boxed{12\\,000\\%}", 12000),
        ("\\boxed{none} 3", None),
        ("\\boxed{72", 72),  # never closed: the last number of the text
    ],
)
def test_forms_that_take_precedence(text: str, number: Fraction | int | None) -> None:
    assert stated_number(text) == number


@pytest.mark.parametrize(
    "text", ["9" * 100_000, "1e999999999 " * 500, "-1," * 20_000, "\\boxed{" * 5_000, "#### " * 5_000, "1/" * 20_000]
)
def test_hostile_text_is_read_quickly(text: str) -> None:
    start = time.process_time()
    stated_number(text)
    assert time.process_time() - start < 5


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "{:,}", "= {}", "${:,}", "{:,}.", "#### {:,}", "\\boxed{{{:,}}}"]),
)
def test_integers_survive_formatting(value: int, form: str) -> None:
    assert stated_number(form.format(value)) == value


@given(st.decimals(-(10**6), 10**6, places=3), st.sampled_from(["{}", "{:,}", "so {}.", "{:,} kg", "{}%"]))
def test_decimals_survive_formatting(value, form: str) -> None:  # type: ignore[no-untyped-def]
    assert stated_number(form.format(value)) == Fraction(value)


@given(st.fractions(), st.sampled_from(["{}", "it is {}.", "\\boxed{{{}}}"]))
def test_fractions_survive_formatting(value: Fraction, form: str) -> None:
    assert stated_number(form.format(value)) == value


@given(st.text(alphabet=st.sampled_from("0123456789.,-+*/()eE$%#\\boxed{} \nx"), max_size=60))
def test_no_text_makes_it_fail(text: str) -> None:
    number = stated_number(text)
    assert number is None or isinstance(number, Fraction)
    try:
        found = last_expression(text)
    except ZeroDivisionError:
        return
    assert found is None or found[0] in text


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    """Expressions that read the same in Python."""
    kind = draw(st.sampled_from(["number", "binary", "binary", "sign", "parentheses"])) if depth else "number"
    if kind == "number":
        return draw(st.one_of(st.integers(0, 9999).map(str), st.decimals(0, 99, places=2).map(str)))
    blank = draw(st.sampled_from(["", " "]))
    if kind == "binary":
        left, right = draw(expressions(depth=depth - 1)), draw(expressions(depth=depth - 1))
        return f"{left}{blank}{draw(st.sampled_from('+-*/'))}{blank}{right}"
    inner = draw(expressions(depth=depth - 1))
    return f"-{inner}" if kind == "sign" else f"({blank}{inner}{blank})"


def _python_value(expression: str) -> Fraction:
    binary = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return binary[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        return Fraction(ast.get_source_segment(expression, node))

    return value(ast.parse(expression, mode="eval").body)


def _is_arithmetic(expression: str) -> bool:
    """Something is added, subtracted, multiplied or divided: -(-(3)) is a number."""
    return any(isinstance(node, ast.BinOp) for node in ast.walk(ast.parse(expression, mode="eval")))


@given(
    expressions().filter(_is_arithmetic),
    st.sampled_from(["{}", "What is {}?", "{}=", "1+1=2\n{} = ", "Compute {} now."]),
)
def test_expressions_have_the_value_that_python_gives(expression: str, form: str) -> None:
    try:
        expected = _python_value(expression)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            last_expression(form.format(expression))
        return
    found = last_expression(form.format(expression))
    assert found is not None
    assert found[1] == expected


@pytest.mark.parametrize(
    ("text", "expression", "value"),
    [
        ("What is 12 + 7?", "12 + 7", 19),
        ("12*3=", "12*3", 36),
        ("2 + 2 = ?", "2 + 2", 4),
        ("1+1=2\n2+2=4\n3+4=", "3+4", 7),  # examples before the question
        ("2 + 3 * 4", "2 + 3 * 4", 14),
        ("(2 + 3) * 4", "(2 + 3) * 4", 20),
        ("8 / 4 / 2", "8 / 4 / 2", 1),
        ("10 - 3 - 2", "10 - 3 - 2", 5),
        ("-5 + 3", "-5 + 3", -2),
        ("2 * -3", "2 * -3", -6),
        ("7 × 6 ÷ 4", "7 × 6 ÷ 4", Fraction(21, 2)),
        ("12 x 7", "12 x 7", 84),
        ("1,000 + 2", "1,000 + 2", 1002),
        ("0.1 + 0.2", "0.1 + 0.2", Fraction(3, 10)),
        ("(What is 3 + 4)", "3 + 4", 7),
        ("3 + 4 - what?", "3 + 4", 7),
    ],
)
def test_expression_in_a_prompt(text: str, expression: str, value: Fraction | int) -> None:
    assert last_expression(text) == (expression, value)


@pytest.mark.parametrize("text", ["", "What is seven?", "7", "-7", "3 +", "3 + (4 - x"])
def test_no_expression(text: str) -> None:
    assert last_expression(text) is None
