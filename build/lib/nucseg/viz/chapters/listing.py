"""Source code of the package on a page, with no line cut off at the page's edge."""

import contextlib
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Callable
from typing import Any

from IPython.display import Markdown

WIDTH = 80  # characters: what a page shows without a scroll bar
_OPEN, _CLOSE = "([{", ")]}"


def listing(*objects: type | Callable[..., Any]) -> Markdown:
    """Show the source of classes and functions as the package has it, with long lines broken."""
    sources = [break_lines(textwrap.dedent(inspect.getsource(one))) for one in objects]
    return Markdown("```python\n" + "\n".join(sources) + "```")


def break_lines(source: str, width: int = WIDTH) -> str:
    """Break the lines of Python ``source`` that are longer than ``width``; the program stays the same.

    Docstrings and comments are wrapped, and a comment behind code moves above it. Code is broken inside its brackets,
    as ruff formats it. Lines without a place to break stay long.
    """
    strings: set[int] = set()  # lines that are inside of a docstring or another string of several lines
    comments: dict[int, int] = {}  # line -> column of its comment
    depth_at: dict[int, int] = {}  # line -> brackets that are open where it begins
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        depth_at.setdefault(token.start[0], depth)
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.start[1]
        elif token.type == tokenize.STRING and token.string.startswith('"""'):
            strings |= set(range(token.start[0], token.end[0] + 1))
        elif token.type == tokenize.OP:
            depth += (token.string in _OPEN) - (token.string in _CLOSE)
    lines: list[str] = []
    rest = ""  # what did not fit into a docstring's line, and begins the next one
    for number, line in enumerate(source.splitlines(), start=1):
        indent = line[: len(line) - len(line.lstrip())]
        if rest and line.strip() not in ("", '"""'):
            line = f"{rest} {line.strip()}"
        elif rest:
            lines.append(rest)
        rest = ""
        if len(line) <= width:
            lines.append(line)
        elif number in strings:
            wrapped = textwrap.wrap(
                line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
            rest = "" if wrapped[-1].endswith('"""') else wrapped.pop()
            lines += wrapped
        elif number in comments:
            code, comment = line[: comments[number]].rstrip(), line[comments[number] :].lstrip("# ")
            lines += textwrap.wrap(comment, width, initial_indent=indent + "# ", subsequent_indent=indent + "# ")
            lines += _break_code(code, width, depth_at[number] > 0) if code else []
        else:
            lines += _break_code(line, width, depth_at[number] > 0)
    return "\n".join(lines) + "\n"


def _break_code(line: str, width: int, inside: bool) -> list[str]:
    """Break one line of code: at its commas if it is ``inside`` brackets, else inside the pair that it ends with."""
    indent = line[: len(line) - len(line.lstrip())]
    if len(line) <= width:
        return [line]
    pairs, commas, depth, start = [], [], 0, 0
    for token in _operators(line):
        column = token.start[1]
        if token.string in _OPEN:
            start = column if depth == 0 else start
            depth += 1
        elif token.string in _CLOSE:
            depth -= 1
            if depth == 0 and column > start + 1:
                pairs.append((start, column))
        elif token.string == "," and depth == 0:
            commas.append(column + 1)
    pieces = [line[a:b].strip() for a, b in zip([0, *commas], [*commas, len(line)], strict=True)]
    pieces = [indent + piece for piece in pieces if piece]
    if inside and len(pieces) > 1:
        return [part for piece in pieces for part in _break_code(piece, width, True)]
    text = re.fullmatch(r'( *f?")([^"\\]*)"(,?)', line)
    if text:  # two strings side by side are one; not within the braces of an f-string
        spaces = [match.end() for match in re.finditer(" ", text[2]) if match.end() < width - len(text[1])]
        whole = [cut for cut in spaces if text[2].count("{", 0, cut) == text[2].count("}", 0, cut)]
        head, tail = (text[2][: whole[-1]], text[2][whole[-1] :]) if whole else ("", text[2])
        return [f'{text[1]}{head}"', *_break_code(f'{text[1]}{tail}"{text[3]}', width, inside)] if head else [line]
    if (
        pairs
        and pairs[-1][0] < width
        and re.fullmatch(r"( -> [^()]+| (?:as|from) \w+)?[,:]?", line[pairs[-1][1] + 1 :])
    ):
        first, last = pairs[-1]
        body = _break_code(f"{indent}    {line[first + 1 : last]}", width, True)
        return [line[: first + 1], *body, indent + line[last:]]
    assigns = re.match(r" *(?:return|[\w.]+ =) ", line)
    if assigns and not inside:  # an expression: in brackets of its own
        return [assigns[0] + "(", *_break_code(f"{indent}    {line[assigns.end() :]}", width, True), indent + ")"]
    if inside and '"' not in line:
        parts = re.split(r"(?= if | else | and | or | [*+/] )", line)
        parts = [parts[0], *(indent + part.strip() for part in parts[1:])]
        return [line for part in parts for line in _break_code(part, width, True)] if len(parts) > 1 else parts
    return [line]


def _operators(line: str) -> list[tokenize.TokenInfo]:
    """The operators of one line, which need not be a whole statement; what looks like one in a string is none."""
    shift = len(line) - len(line.lstrip())
    found = []
    with contextlib.suppress(tokenize.TokenError):  # the statement goes on in the next line
        for token in tokenize.generate_tokens(io.StringIO(line.lstrip()).readline):
            if token.type == tokenize.OP and token.start[0] == 1:
                found.append(token._replace(start=(1, token.start[1] + shift)))
    return found
