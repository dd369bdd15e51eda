"""The ledger of the report's claims: its tables, and numbers held against its wording."""

import ast
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from nucseg.errors import InputError
from nucseg.records.quotes import check
from nucseg.viz import figures

VERDICTS = ("holds", "partly", "does not hold", "cannot be checked", "note")
# Where a claim is checked: its key in claims.csv -> the words and the target of the link
PLACES = {
    "code": ("the report's code", ""),
    "data": ("the data", "data.ipynb"),
    "lora": ("LoRA", "lora.ipynb"),
    "finetuning": ("fine-tuning", "finetuning.ipynb"),
    "weights": ("model", "#report-model"),
    "table 1": ("Table 1", "#report-table-1"),
    "table 2": ("Table 2", "#report-table-2"),
    "table 3": ("Table 3", "#report-table-3"),
    "table 4": ("Table 4", "#report-table-4"),
    "pictures": ("pictures", "#report-pictures"),
    "open": ("discussion", "#report-discussion"),
    "folds": ("folds", "#claims-folds"),
    "aji": ("AJI", "#claims-aji"),
    "input": ("frozen encoder", "#claims-input"),
    "ceiling": ("touching nuclei", "#claims-ceiling"),
    "search": ("search", "#claims-search"),
}


@dataclass(frozen=True)
class Ledger:
    """The claims of the report, one row each, from ``book/reference/claims.csv``.

    ``table``: index ``number`` from 1; columns ``claim``, ``verdict`` (one of `VERDICTS`), ``evidence``, ``section``
    (keys of `PLACES`, separated by "; "), ``part`` (of the report) and ``cause`` (why it does not hold, or empty).
    """

    table: pd.DataFrame

    @classmethod
    def read(cls, path: str | Path) -> "Ledger":
        """Read the ledger. Raises ``InputError`` for a repeated number, an unknown verdict or an unknown section."""
        table = pd.read_csv(path, index_col="number", keep_default_na=False)
        keys = {key for section in table["section"] for key in section.split("; ")}
        if not table.index.is_unique or not set(table["verdict"]) <= set(VERDICTS) or not keys <= set(PLACES):
            raise InputError(f"{path}: each number may occur once, with a verdict and sections from the known ones.")
        return cls(table)

    def agree(self, number: int, computed: dict[str, float | str]) -> None:
        """Stop unless the evidence of a claim quotes each text, and the text is what was computed.

        ``computed``: {text in the evidence: value}; numbers are compared as by `check`, strings as they are.
        Raises ``AssertionError``.
        """
        evidence = str(self.table.loc[number, "evidence"])
        for text, value in computed.items():
            assert re.search(_whole(text), evidence), f"Claim {number} does not quote {text}: correct claims.csv."
            if isinstance(value, str):
                assert text == value, f"Claim {number} says {text}, but it is {value}: correct claims.csv."
            else:
                check(text, value)

    def unexplained(self, scripts: Path) -> dict[int, str]:
        """The evidence whose numbers no chapter in ``scripts`` computes, by claim; empty if all is well.

        A number in the evidence is either computed, in a call of `agree` with that text, or it was read in the report's
        code, which the first section says.
        """
        held = quoted(scripts)
        left = {}
        for number, found, section in zip(self.table.index, self.table["evidence"], self.table["section"], strict=True):
            evidence = re.sub(r"Table \d", "", found)
            for text in sorted(held[number], key=len, reverse=True):
                evidence = re.sub(_whole(text), "", evidence)
            if re.search(r"\d", evidence) and not section.startswith("code"):
                left[number] = evidence
        return left

    def part(self, name: str) -> Markdown:
        """Table of the claims in one part of the report: number, claim, verdict."""
        rows = self.table[self.table["part"] == name]
        return _markdown(["", "the report says", "verdict"], [[n, r["claim"], _verdict(r)] for n, r in rows.iterrows()])

    def cause(self, name: str) -> Markdown:
        """Table of the claims behind one cause: number, claim, what was found, verdict."""
        rows = self.table[self.table["cause"] == name]
        lines = [[n, _found(r), _verdict(r)] for n, r in rows.iterrows()]
        return _markdown(["", "the report says, and what was found", "verdict"], lines)

    def verdict(self, name: str) -> Markdown:
        """Table of the claims with one verdict: number, claim, what was found, where it is checked."""
        rows = self.table[self.table["verdict"] == name]
        lines = [[n, _found(r), places(r["section"])] for n, r in rows.iterrows()]
        return _markdown(["", "the report says, and what was found", "checked in"], lines)

    def entries(self, *parts: str) -> Markdown:
        """Table of all entries in parts of the report: number, claim, what was found, where it is checked, verdict."""
        rows = self.table[self.table["part"].isin(parts)]
        lines = [[n, f"{_found(r)} *{places(r['section'])}*", _verdict(r)] for n, r in rows.iterrows()]
        return _markdown(["", "the report says, what was found, *and where it is checked*", "verdict"], lines)


def quoted(scripts: Path) -> defaultdict[int, set[str]]:
    """The texts that the chapters' cells hold against the evidence: {claim: texts}.

    Reads the calls ``….agree(number, {"text": value, …})`` in the Python twins in the folder ``scripts``.
    """
    found: defaultdict[int, set[str]] = defaultdict(set)
    for path in sorted(scripts.glob("[!_]*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "agree":
                number, computed = (ast.unparse(argument) for argument in node.args)
                keys = ast.parse(computed, mode="eval").body
                if isinstance(keys, ast.Dict):
                    found[int(number)] |= {k.value for k in keys.keys if isinstance(k, ast.Constant)}  # type: ignore[misc]
    return found


def sentence(phrase: str) -> str:
    """A phrase as a sentence: with a capital letter and a full stop."""
    return f"{phrase[:1].upper()}{phrase[1:]}."


def places(section: str) -> str:
    """Markdown links to the sections that check a claim, from their keys in `PLACES`."""
    words = [PLACES[key] for key in section.split("; ")]
    return ", ".join(f"[{name}]({target})" if target else name for name, target in words)


def plot_tally(ledger: Ledger) -> Figure:
    """Draw the number of claims with each verdict, without the notes."""
    verdicts = [v for v in VERDICTS if v != "note"]
    tally = ledger.table["verdict"].value_counts().reindex(verdicts)
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 1.9))
    colours = (figures.SERIES[0], figures.PREDICTION, figures.TRUTH, figures.FOUND)
    bars = ax.barh(tally.index[::-1], tally[::-1], color=colours[::-1], height=0.7)
    ax.bar_label(bars, padding=4)
    ax.tick_params(axis="y", length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set(xticks=[])
    return figure


def _found(row: "pd.Series[str]") -> str:
    return f"**{row['claim']}.** {sentence(row['evidence'])}"


def _verdict(row: "pd.Series[str]") -> str:
    """The verdict, with no-break spaces in the one that a narrow column would break."""
    return str(row["verdict"]).replace("does not hold", "does\u00a0not\u00a0hold")


def _markdown(heads: list[str], rows: Sequence[Sequence[object]]) -> Markdown:
    lines: list[Sequence[object]] = [heads, ["--:", *[":--"] * (len(heads) - 1)], *rows]
    return Markdown("\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines))


def _whole(text: str) -> str:
    """A pattern for the text that does not match inside a longer number."""
    return rf"(?<![\d.,]){re.escape(text)}(?![\d%])"
