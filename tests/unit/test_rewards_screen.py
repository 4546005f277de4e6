"""What must not reach sympy, told by its text; and what looks alike and must."""

import pytest

from rltk.rewards.math import last_boxed
from rltk.rewards.screen import _bound, screen
from rltk.tasks.reasoning_gym import EXPRESSION


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        (r"9^{9^{9}x^{0}}", "tower of exponents"),  # a variable that cancels hides nothing
        (r"9^{\sqrt{9^{99}}}", "tower of exponents"),
        (r"(9^{9999})^{9999}", "an exponent above"),
        (r"\left\{9^{9999}\right\}^{9999}", "an exponent above"),
        (r"9^\frac{387420489}{1}", "an exponent above"),
        (r"9^{999{,}999}", "an exponent above"),
        (r"9^{1 000 000}", "an exponent above"),
        ("1E+1000000000", "an exponent above"),
        ("(10^6)!", "a factorial above"),
        (r"(900 \cdot 900)!", "a factorial above"),
        (r"\left(9^{9}\right)!", "a factorial above"),
        (r"9^{999}!", "a factorial above"),
        (r"\frac{10^9}{1}!", "a factorial above"),
        (r"\lfloor 10^9 \rfloor !", "a factorial above"),
        ("|1000000000|!", "a factorial above"),
        (r"1000000\,!", "a factorial above"),
        ("1,000,000!", "a factorial above"),
        ("9!!", "a factorial above"),
        ("5!!!!", "a factorial above"),
        (r"\Gamma(10^9)", "has Gamma of more than"),
        (r"\operatorname{ones}(9999,9999)", "has operatorname{ones} of more than"),
        (r"\binom{10^9}{10^8}", "a binomial of more than"),
        (r"\binom{\binom{99}{49}}{\binom{90}{45}}", "a binomial of more than"),
        (r"\binom{x}{999999999}", "a binomial of more than"),
        (r"{10^9 \choose 10^8}", "a binomial of more than"),
    ],
)
def test_what_sympy_would_not_finish(expression, reason):
    assert reason in screen(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "2^{3^2}",
        "(2^3)!",
        "(3!)!",
        "3!!",
        "n!!",
        "x != 1000",
        r"5\!",
        r"\frac{10!}{3!\,7!}",
        r"\binom{2024}{1012}",
        r"\binom{n}{k}",
        r"{10 \choose 3}",
        r"\Gamma(\frac12)",
        r"\left(\frac{1}{2}\right)^{10}",
        "(x+1)^{100}(y+1)^{200}",
        "(x^2+x+1)^{500}",
        "2024^{2024}",
        r"x^{1{,}234}",
        "1.5e10",
        r"\{1200,\ 1300\}",
        r"\int_0^1 x^{x^{x}} dx",
    ],
)
def test_what_it_can(expression):
    assert screen(expression) is None


@pytest.mark.parametrize(
    "text", ["2^3", "(2^3)", "{2}^{3}", "3!+2", r"2 \cdot 3", "(1+1)(2+2)", r"\frac{8}{2}", "2^{2^2}"]
)
def test_the_bound_is_no_less_than_the_value(text):
    values = {"3!+2": 8, r"2 \cdot 3": 6, "(1+1)(2+2)": 4, r"\frac{8}{2}": 4, "2^{2^2}": 16}
    assert values.get(text, 8) <= _bound(text) < 10_000


def test_the_readers_before_the_screen_are_linear():
    """Each took minutes and more when it read a text in more ways than one, or once for each box."""
    assert not EXPRESSION.fullmatch("1" * 100_000 + "!") and not EXPRESSION.fullmatch("a" * 100_000 + "!")
    assert EXPRESSION.fullmatch("(1.5 + .5*x1)**2/3.")
    assert last_boxed(r"\boxed{" * 20_000 + "1}") == "1" and last_boxed(r"\boxed{1}" + r"\boxed{" * 20_000) == "1"
    assert last_boxed(r"\boxed{a\boxed{b}} \boxed{c") == "b"
