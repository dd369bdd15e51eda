"""Numbers quoted in prose."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nucseg.records.quotes import check


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.453", 0.45349),
        ("0.453", 0.4526),
        ("124,321", 124321),
        ("1.21%", 0.012123),
        ("22 %", 0.2249),
        ("−0.026", -0.0262),
        ("-0.026", -0.0262),
        ("+0.014", 0.0138),
        ("0.026", -0.0262),  # "falls by 0.026"
        ("133", 133),
    ],
)
def test_a_number_that_holds_passes(text, value):
    check(text, value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.453", 0.4536),
        ("124,321", 124322),
        ("1.21%", 0.0131),
        ("1.21%", 1.21),
        ("+0.014", -0.014),
        ("−0.026", 0.026),
        ("0.453", float("nan")),
        ("0.453", float("inf")),
    ],
)
def test_one_that_does_not_stops_the_build(text, value):
    with pytest.raises(AssertionError, match="correct the sentence"):
        check(text, value)


@pytest.mark.parametrize("text", ["", "about 3", "0.4 to 0.5", "1e-3", "%"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="is not a number"):
        check(text, 1.0)


@given(st.integers(-(10**6), 10**6), st.integers(0, 4))
def test_what_is_printed_from_a_value_holds_for_it_and_not_one_digit_further(n, decimals):
    value = n / 10**decimals
    text = f"{abs(value):,.{decimals}f}"
    check(text, value)
    with pytest.raises(AssertionError):
        check(text, abs(value) + 10.0**-decimals)
