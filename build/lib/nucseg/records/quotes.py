"""Numbers quoted in prose, checked against the values that they stand for."""

import re

_NUMBER = re.compile(r"(?P<sign>[+−-]?)(?P<digits>\d[\d,]*)(?:\.(?P<decimals>\d+))?(?P<percent> ?%)?")


def check(text: str, value: float) -> None:
    """Stop unless ``value``, rounded as in ``text``, is the number that ``text`` gives.

    ``text``: the number as a sentence prints it: "0.453", "−0.026", "+0.014", "124,321", "1.21%". A value in percent is
    given as a fraction: ``check("1.21%", 0.0121)``. A number without sign may quote a negative difference ("falls by
    0.026"), so only a printed sign is compared.

    Raises ``AssertionError``, which stops the book's build, and ``ValueError`` if ``text`` is no number.
    """
    found = _NUMBER.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not a number as prose prints it, such as '0.453', '124,321' or '1.21%'.")
    decimals = len(found["decimals"] or "")
    rounded = round(float(value) * (100 if found["percent"] else 1), decimals)
    quoted = float(found["digits"].replace(",", "") + "." + (found["decimals"] or "0"))
    if found["sign"] in ("−", "-"):
        quoted = -quoted
    elif not found["sign"]:
        rounded = abs(rounded)
    if not abs(rounded - quoted) <= 0.01 * 10.0**-decimals:  # not ">": NaN agrees with nothing
        raise AssertionError(f"The text says {text}, but the value is {value:.{decimals + 3}g}: correct the sentence.")
