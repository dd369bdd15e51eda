"""The examples of the page *nucseg in Python* run, and each name of the public API has one."""

import doctest
import re
import tempfile
from pathlib import Path

import nucseg

PAGE = Path(__file__).parents[2] / "book" / "python.md"


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = re.sub(r"^```\w*$", "", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    result = runner.run(test, out=said.append)
    assert result.attempted > 25 and not result.failed, "".join(said)


def test_every_public_name_has_an_example():
    examples = "".join(
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith((">>>", "..."))
    )
    for name in set(nucseg.__all__) - {"__version__"}:
        assert f"nucseg.{name}" in examples, name
