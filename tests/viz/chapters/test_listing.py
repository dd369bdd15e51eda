"""Source code on a page: every line fits, and the program is still the same."""

import ast
import inspect
import textwrap

import pytest

pytest.importorskip("IPython")

from nucseg.model import lora, network
from nucseg.training import loop, losses
from nucseg.viz.chapters.listing import WIDTH, break_lines, listing


def program(source: str) -> str:
    """The syntax tree without docstrings."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = " ".join(node.value.value.split())
    return ast.dump(tree)


@pytest.mark.parametrize("module", [lora, network, losses, loop], ids=lambda m: m.__name__)
def test_a_module_stays_the_same_program(module):
    source = inspect.getsource(module)
    broken = break_lines(source)
    assert program(broken) == program(source)
    long = [sum(len(line) > WIDTH for line in text.splitlines()) for text in (broken, source)]
    assert long[0] < 0.2 * long[1]


SHOWN = [lora.LoRALinear, lora.LoRAConv2d, lora._Adapted, lora.LoRALayer.merge, losses.focal_loss, loop.train_epoch]


@pytest.mark.parametrize("one", SHOWN)
def test_what_the_chapters_show_fits_the_page(one):
    lines = listing(one).data.splitlines()
    assert lines[0] == "```python" and lines[-1] == "```"
    assert max(map(len, lines)) <= WIDTH


def test_brackets_commas_comments_and_docstrings():
    source = (
        'def f(a, b):\n    """One two three four five."""\n'
        "    return g(a[0, 1], b, c=1)  # why it is done\n"
        "def h(\n    first: int, second: str = '(,', third=(1, 2)\n):\n    total = first.size if second else third\n"
    )
    assert break_lines(source, 26) == (
        'def f(a, b):\n    """One two three four\n    five."""\n'
        "    # why it is done\n    return g(\n        a[0, 1], b, c=1\n    )\n"
        "def h(\n    first: int,\n    second: str = '(,',\n    third=(1, 2)\n):\n"
        "    total = (\n        first.size\n        if second\n        else third\n    )\n"
    )


def test_a_short_program_is_left_alone():
    source = "def f(x):\n    # a comment\n    return x + 1\n"
    assert break_lines(source) == source
