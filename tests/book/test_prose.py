"""No measured number is typed without a check, and no sentence is made by code.

A number in a chapter's text is quoted from a table in ``book/reference``, is a constant of ``KNOWN``, or is the text of
a ``check("…", value)`` in the same section, which stops the build once the results say otherwise.
"""

import ast
import json
import re
import shutil
from functools import cache

import pandas as pd
import pytest

pytest.importorskip("jupytext")

from shape import BOOK, ROOT, for_each

from nucseg.records.quotes import check
from nucseg.records.runs import results_folder, study_runs
from nucseg.records.statistics import difference, summarise
from nucseg.viz.chapters import changes, hyperparameters
from tools.count_cells import Cell, cells, sections, twins, words_in_f_strings

if not BOOK.is_dir():
    pytest.skip("the book is not part of an installed package", allow_module_level=True)

TEMPLATE = BOOK / "scripts" / "_template.py"
# decimals, numbers with a thousands comma, and percentages, with the sign in front
NUMBER = re.compile(
    r"(?<![\w.,/=-])[−+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?(?: ?%)?|\d+\.\d+(?: ?%)?|\d+ ?%)(?![\w]|[.,]\d)"
)
# numbers that are no measurement, each with its reason
KNOWN = {
    "0.25": "µm a pixel: an assumption, said to be one",
    "0.5": "a threshold, an axis, or half",
    "1.6": "GB of NuInsSeg.zip, at Zenodo",
    "3.11": "the Python version",
    "1.0": "the other end of a scale",
    "0.0": "one end of a scale",
    "95%": "the level of every interval",
    "100%": "the whole",
}
# directives whose content is text; that of others, such as code and formulas, is not
TEXTUAL = (
    r"\{(?:exercise|solution|admonition|note|tip|warning|important|hint|dropdown|list-table|table|figure|epigraph)"
)


def prose(markdown: str) -> str:
    """Markdown without code, formulas, roles, link targets and directives' options."""
    kept, fences, hidden = [], [], 0
    for line in markdown.splitlines():
        fence = re.match(r"\s*(`{3,}|:{3,})(.*)", line)
        if fence and fences and not fence[2].strip() and len(fence[1]) >= len(fences[-1][0]):
            hidden -= fences.pop()[1]
        elif fence and not hidden:
            textual = re.match(TEXTUAL, fence[2].strip()) is not None
            fences.append((fence[1], not textual))
            hidden += not textual
            kept.append(fence[2].partition("}")[2])
        elif not hidden and not re.match(r"\s*:[\w-]+:( |$)", line):
            kept.append(line)
    text = "\n".join(kept)
    text = re.sub(r"\$\$.*?\$\$|`[^`]*`|\$[^$\n]*\$|\]\([^)]*\)|<https?://[^>]*>", " ", text, flags=re.DOTALL)
    return text


def numbers(text: str) -> list[str]:
    """The numbers of a text as written, with the sign and without a space before the percent sign."""
    return [found.replace(" %", "%") for found in NUMBER.findall(text)]


def reference_numbers() -> set[str]:
    """Every number of the report and of published tables that the book quotes, as it may be written."""
    found = set()
    for path in (BOOK / "reference").glob("*.csv"):
        for text in pd.read_csv(path, dtype=str).fillna("").to_numpy().ravel():
            for number, percent in re.findall(r"(\d+(?:[.,]\d+)*)( ?%)?", text):
                found |= {number, number + "%"} if percent or "." in number else {number}
    return found


ALLOWED = reference_numbers() | KNOWN.keys()
ALLOWED |= {number.replace(",", "") for number in ALLOWED}


def checked(section: list[Cell]) -> set[str]:
    """The texts of the section's ``check`` calls, without sign, and with it if there is one."""
    found = set()
    for cell in section:
        for node in ast.walk(ast.parse(cell.source if cell.kind == "code" else "")):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check":
                if isinstance(node.args[0], ast.Constant):
                    text = node.args[0].value.replace("-", "−").replace(" %", "%")
                    found |= {text, text.lstrip("−+")}
                else:  # one check in a loop over pairs: the texts are the section's strings
                    for other in ast.walk(ast.parse(cell.source)):
                        if isinstance(other, ast.Constant) and isinstance(other.value, str):
                            text = other.value.replace("-", "−").replace(" %", "%")
                            found |= {text, text.lstrip("−+")}
    return found


def unchecked(section: list[Cell]) -> list[str]:
    """Return the numbers in a section's text, captions and longer strings that no cell checks and no list allows."""
    known = checked(section)
    texts = [text for cell in section for text in cell.captions]
    for cell in section:
        if cell.kind == "markdown":
            texts.append(prose(cell.source))
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 3:
                texts.append(re.sub(r"`[^`]*`", "", node.value))
    found = [number for text in texts for number in numbers(text)]
    # a number written with its sign needs a check with that sign
    return [
        number
        for number in found
        if number not in known and number.lstrip("−+").replace(",", "") not in ALLOWED and number not in ALLOWED
    ]


a_chapter = for_each([TEMPLATE, *twins()])


@a_chapter
def test_each_number_in_the_text_is_checked_in_its_section(path):
    found = {heading: unchecked(section) for heading, section in sections(cells(path))}
    assert {heading: left for heading, left in found.items() if left} == {}


@pytest.mark.parametrize("path", sorted(BOOK.glob("*.md")), ids=lambda p: p.stem)
def test_each_number_of_other_pages_is_known(path):
    page = Cell("markdown", path.read_text(encoding="utf-8"), frozenset())
    values = dict(first_page()) if path.stem == "intro" else {}
    assert [number for number in unchecked([page]) if number not in values] == []


@cache
def first_page() -> list[tuple[str, float]]:
    """The numbers of the first page, and what the recorded results give for them."""
    ablation, folds, protocol = (study_runs(name)["offline-small"] for name in ("ablation", "folds", "protocol"))
    report, book = ablation["linear"], ablation["fresh-head"]  # both heads begin from random weights
    values = [(report.scores[name].mean(), book.scores[name].mean()) for name in ("dice", "aji", "pq")]
    worth = difference(book.scores, report.scores)
    gains = hyperparameters.worth(study_runs("lora-worth")["broad-small"], "head only")
    lora = [
        value for label in ("LoRA, rank 8", "LoRA, rank 8, on Conv2d too") for value in changes.interval(gains[label])
    ]
    means = summarise(pd.concat([run.scores for run in folds.values()]))["fold_mean"]
    recipe = summarise(pd.concat([run.scores for run in study_runs("best")["broad-small"].values()]))["fold_mean"]
    pretraining = json.loads((results_folder() / "pretrain" / "broad" / "run.json").read_text(encoding="utf-8"))
    folder = results_folder() / "protocol" / "offline-small"
    again = pd.concat([pd.read_csv(folder / run / "as-the-report" / "scores.csv") for run in protocol])
    per_image = again.groupby(["tissue", "stem"])[["aji", "aji_matched_only"]].mean().mean()
    numbers = [value for pair in values for value in pair]
    numbers += [value for row in worth[["difference", "low", "high"]].to_numpy() for value in row]
    numbers += [ablation["without-distance"].scores["aji"].mean()]
    numbers += [*lora, *per_image, *means[["dice", "aji", "pq"]]]
    numbers += [*recipe[["dice", "aji", "pq"]], pretraining["seconds"] / 3600]
    gains = pd.read_csv(results_folder() / "gains" / "scores.csv")
    mirrored = gains[gains["way"] == "mirrored views, tuned with confidence"]
    numbers += [*mirrored.groupby("fold")[["dice", "aji", "pq"]].mean().mean()]
    texts = """0.678 0.753 0.263 0.472 0.220 0.389
        +0.075 0.064 0.087 +0.209 0.189 0.229 +0.170 0.152 0.188
        0.350 +0.007 0.001 0.013 +0.034 0.025 0.043 0.252 0.335 0.780 0.522 0.453
        0.791 0.550 0.525 2.4 0.795 0.560 0.536"""
    return list(zip(texts.split(), numbers, strict=True))


def test_the_first_page_gives_the_recorded_numbers():
    page = (BOOK / "intro.md").read_text(encoding="utf-8")
    for text, value in first_page():
        check(text, value)
        assert text in page


def test_the_first_page_says_what_is_behind_its_numbers():
    ablation = study_runs("ablation")["offline-small"]
    report, book = ablation["linear"].about, ablation["fresh-head"].about
    differing = {name for name in book["config"] if book["config"][name] != report["config"][name]}
    assert differing == {"head", "head_start"} and book["split"] == report["split"] and book["base"] == report["base"]
    pretraining = json.loads((results_folder() / "pretrain" / "deep" / "run.json").read_text(encoding="utf-8"))
    text = (BOOK / "intro.md").read_text(encoding="utf-8")
    for fact in (
        f"{book['split']['test']} test images",
        f"{['', 'one', 'two', 'three'][book['config']['epochs']]} epochs on {book['split']['train']} images",
        f"LoRA of rank {book['config']['rank']}",
        f"in {pretraining['seconds'] / 60:.0f} minutes on a CPU",
    ):
        assert fact in " ".join(text.split()), fact
    assert {run.about["device"] for run in ablation.values()} == {"CPU, 1 thread, x86_64"}


@a_chapter
def test_links_to_other_pages_can_be_followed_in_jupyter(path):
    """A role such as ``doc`` works in the pages only; a Markdown link works in both, if its file is there."""
    text = path.read_text(encoding="utf-8")
    assert "{doc}" not in text, "write [title](file.ipynb) instead of the role doc"
    for target in re.findall(r"\]\(([^():#]+\.(?:ipynb|md))\)", text):
        assert (BOOK / "chapters" / target).is_file(), f"{target} does not exist"


@a_chapter
def test_no_sentence_is_made_by_code(path):
    for cell in cells(path):
        if cell.kind != "code":
            continue
        assert words_in_f_strings(cell.source) == 0, cell.source
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Markdown":
                assert not made_by_code(node), ast.unparse(node)


def made_by_code(call: ast.Call) -> bool:
    """Whether the text that ``Markdown`` is called with is put together on the spot."""
    parts = [part for argument in call.args for part in ast.walk(argument)]
    methods = [p.func.attr for p in parts if isinstance(p, ast.Call) and isinstance(p.func, ast.Attribute)]
    kinds = (ast.JoinedStr, ast.BinOp, ast.IfExp)
    return any(isinstance(part, kinds) for part in parts) or bool({"format", "join", "replace"} & set(methods))


class TestTheRules:
    """Each rule finds what it is there to find."""

    def section(self, text: str, code: str = "") -> list[Cell]:
        return [Cell("markdown", text, frozenset()), Cell("code", code, frozenset({"hide-input"}))]

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("a Dice of 0.738 and 124,321 weights, alpha=0.25, v1.2.3, 512 px.", ["0.738", "124,321"]),
            ("It falls by −0.026 (+0.014 to 0.033).", ["−0.026", "+0.014", "0.033"]),
            ("1.21% or 60 % of 12 images, in 2026; 3.5.", ["1.21%", "60%", "3.5"]),
            ("`0.1` and $r = 0.2$ and [0.3](page-0.4.html) {term}`a 0.5`", ["0.3"]),
            ("```python\nx = 0.1\n```\n```{note}\n:width: 0.2\nIt is 0.3.\n```\nand 0.4", ["0.3", "0.4"]),
            ("```{exercise} Of 0.1\n:label: ex-x\nIt is 0.2.\n```", ["0.1", "0.2"]),
        ],
    )
    def test_numbers_are_found_in_prose(self, text, found):
        assert numbers(prose(text)) == found

    @pytest.mark.parametrize(
        ("text", "code", "left"),
        [
            ("It is 0.738.", "", ["0.738"]),
            ("It is 0.738.", 'check("0.738", x)', []),
            ("It is 0.738.", 'check("0.737", x)', ["0.738"]),
            ("It is 0.738.", '"0.738"', ["0.738"]),
            ("It is −0.738.", 'check("0.738", x)', ["−0.738"]),
            ("It is −0.738.", 'check("−0.738", x)', []),
            ("It falls by 0.738.", 'check("−0.738", x)', []),
            ("It is 71.77%.", 'check("71.77%", x)', []),
            ("It is 71.77%.", 'check("71.77", x)', ["71.77%"]),
            ("It is 0.738.", 'for text, x in [("0.738", a)]:\n    check(text, x)', []),
            ("It is said to be 0.7968.", "", []),  # the report's Dice coefficient
        ],
    )
    def test_a_number_needs_a_check_of_its_own(self, text, code, left):
        assert unchecked(self.section(text, code)) == left

    def test_a_check_in_another_section_does_not_count(self):
        chapter = [*self.section("## A\nIt is 0.738."), *self.section("## B\nAgain.", 'check("0.738", x)')]
        assert [unchecked(section) for _, section in sections(chapter)] == [[], ["0.738"], []]

    def test_captions_are_text(self):
        assert unchecked([Cell("code", "plt.show()", frozenset(), ("It is 0.738.",))]) == ["0.738"]

    @pytest.mark.parametrize(
        ("code", "made"),
        [
            ('Markdown(f"It is {x}.")', True),
            ('Markdown("It is " + x)', True),
            ('Markdown("It is {}".format(x))', True),
            ('Markdown("It is %s" % x)', True),
            ('Markdown("yes" if x else "no")', True),
            ("Markdown(provenance_note(runs=[*a, *b]))", False),
        ],
    )
    def test_a_sentence_made_by_code_is_found(self, code, made):
        node = ast.parse(code).body[0].value
        assert made_by_code(node) == made

    def test_f_strings_may_label_but_not_tell(self):
        assert words_in_f_strings('plt.title(f"rank {r}, {n} images of the fold")') == 0
        assert words_in_f_strings('f"Of the {n} images that were tried here {m} did better."') == 9


class TestChangedResults:
    """A recorded number that changes stops the cell that checks the sentence which quotes it."""

    @pytest.fixture
    def code(self) -> str:
        """A section of the chapter on LoRA: its table of paired differences, and the checks of what it quotes."""
        chapter = cells(BOOK / "scripts" / "lora.py")
        (section,) = (inside for heading, inside in sections(chapter) if heading == "LoRA on convolutions")
        statements = [s for cell in chapter if cell.kind == "code" for s in ast.parse(cell.source).body]
        imports = [ast.unparse(s) for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
        wanted = ("from nucseg.records.", "import pandas")
        kept = [line for line in imports if line.startswith(wanted)]
        for cell in section:
            for statement in ast.parse(cell.source if cell.kind == "code" else "").body:
                text = ast.unparse(statement)
                if text.startswith(("runs =", "paired =")) or (text.startswith("check(") and "paired" in text):
                    kept.append(text)
        assert sum(line.startswith("check(") for line in kept) >= 2
        return "\n".join(kept)

    def test_the_checks_of_a_section(self, tmp_path, code, monkeypatch):
        (tmp_path / "nucseg").mkdir()  # so that the folder is taken for the repository
        shutil.copytree(ROOT / "results" / "recipe", tmp_path / "results" / "recipe")
        monkeypatch.chdir(tmp_path)
        exec(code, {})
        path = tmp_path / "results" / "recipe" / "offline-small" / "lora-conv-fold_2" / "scores.csv"
        scores = pd.read_csv(path, dtype=str)
        scores.loc[0, "pq"] = str(float(scores.loc[0, "pq"]) + 0.2)
        scores.to_csv(path, index=False)
        with pytest.raises(AssertionError, match=r"The text says \+0.012, but the value is 0.014"):
            exec(code, {})
