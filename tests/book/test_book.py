import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

yaml = pytest.importorskip("yaml")
nbformat = pytest.importorskip("nbformat")
jupytext = pytest.importorskip("jupytext")

from shape import BOOK, NOT_YET, ROOT, for_each

from tools import count_cells

if not BOOK.is_dir():
    pytest.skip("the book is not part of an installed package", allow_module_level=True)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sync = load(BOOK / "sync.py")
build = load(BOOK / "build.py")
CONFIG = yaml.safe_load((BOOK / "_config.yml").read_text(encoding="utf-8"))
TOC = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
NOTEBOOKS = sorted((BOOK / "chapters").glob("*.ipynb"))

SETUP = (BOOK / "scripts" / "_template.py").read_text(encoding="utf-8").splitlines()[1]
SETUP_CELL = f'# %% tags=["remove-cell"]\n{SETUP}\n\n'

a_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
a_chapter = for_each([BOOK / "scripts" / "_template.py", *(BOOK / "scripts" / f"{n.stem}.py" for n in NOTEBOOKS)])


def cells(path: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def figure_names(path: Path) -> list[str]:
    figures = [cell.metadata.get("mystnb", {}).get("figure") for cell in cells(path, "code")]
    return [figure["name"] for figure in figures if figure]


class TestNotebooks:
    def test_there_are_some(self):
        assert NOTEBOOKS

    @a_notebook
    def test_it_agrees_with_its_twin(self, path):
        twin = BOOK / "scripts" / f"{path.stem}.py"
        assert sync.difference(path, twin) == ""
        mine, its = (jupytext.read(p).cells for p in (path, twin))  # and by jupytext's own reading
        mine = [cell for cell in mine if "caption" not in cell.metadata.get("tags", [])]
        assert [(c.cell_type, c.source) for c in mine] == [(c.cell_type, c.source) for c in its]

    @a_notebook
    def test_jupyter_shows_each_caption_below_its_figure(self, path):
        chapter = nbformat.read(path, as_version=4).cells
        captions = [c for c in chapter if "caption" in c.metadata.get("tags", [])]
        assert all(c.cell_type == "markdown" and "remove-cell" in c.metadata.tags for c in captions)
        drawn = [i for i, c in enumerate(chapter) if "figure" in c.metadata.get("mystnb", {})]
        assert [chapter[i + 1] for i in drawn] == captions and len(drawn) == len(figure_names(path))
        for i in drawn:
            caption = chapter[i].metadata.mystnb.figure.caption.partition("{{")[0]
            assert chapter[i + 1].source.startswith(f"> **Figure.** {caption}") and "{{" not in chapter[i + 1].source

    @a_notebook
    def test_jupyter_folds_checks_and_solutions_and_nothing_else(self, path):
        solution = False
        for cell in nbformat.read(path, as_version=4).cells:
            if "{solution-" in cell.source:
                solution = "{solution-start}" in cell.source.rpartition("{solution-end}")[2]
            if cell.cell_type == "code":
                folded = solution or bool({"hide-input", "remove-cell"} & set(cell.metadata.get("tags", [])))
                assert cell.metadata.get("jupyter", {}) == ({"source_hidden": True} if folded else {}), cell.source

    @a_notebook
    def test_it_is_committed_without_outputs(self, path):
        for cell in cells(path, "code"):
            assert not cell.outputs and cell.execution_count is None

    @a_notebook
    def test_every_picture_has_alternative_text_a_caption_and_a_name(self, path):
        names = []
        for cell in cells(path, "code"):
            draws = "plt.show()" in cell.source or re.search(r"^show_\w+\(", cell.source, re.MULTILINE)
            mystnb = cell.metadata.get("mystnb", {})
            assert bool(draws) == ("figure" in mystnb), cell.source
            if draws:
                assert len(mystnb["image"]["alt"]) > 40 and mystnb["figure"]["caption"].endswith(".")
                names.append(mystnb["figure"]["name"])
        others = {n for other in NOTEBOOKS if other != path for n in figure_names(other)}
        assert len(set(names)) == len(names) and not others & set(names)
        assert all(n.startswith("fig-") for n in names)
        for cell in cells(path, "markdown"):
            assert not re.search(r"!\[\s*\]", cell.source)

    @a_notebook
    def test_it_is_in_the_table_of_contents(self, path):
        entries = [entry for top in TOC["chapters"] for entry in (top, *top.get("sections", []))]
        assert f"chapters/{path.stem}" in [entry["file"] for entry in entries]


def directives(text: str, name: str) -> dict[str, str]:
    """{label: text} of the exercises or solutions in a chapter's Markdown; ``name`` may be a pattern."""
    pattern = rf"^(`{{3,}}|:{{3,}})\{{{name}\}} *(.*)\n((?:.*\n)*?)\1`*$"
    found = re.findall(pattern, text, re.MULTILINE)
    labels = [re.findall(r"^:label: (\S+)", body, re.MULTILINE) or [title] for _, title, body in found]
    return {label[0]: body for label, (_, _, body) in zip(labels, found, strict=True)}


class TestShape:
    """A chapter has the parts of the template, in its order."""

    @pytest.fixture
    def chapter(self, path) -> list:
        return jupytext.read(path).cells

    @pytest.fixture
    def text(self, chapter) -> str:
        return "\n\n".join(cell.source for cell in chapter if cell.cell_type == "markdown") + "\n"

    @a_chapter
    def test_it_has_the_parts_of_the_template(self, text):
        bare = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        headings = re.findall(r"^## (.+)$", bare, re.MULTILINE)
        last = ["Summary", "Exercises", "Further reading"]
        assert headings[0] == "Overview" and headings[-3:] == last and len(headings) > 4
        assert len(set(headings)) == len(headings) and len(re.findall(r"^# .+$", bare, re.MULTILINE)) == 1
        lead = bare.partition("## Overview")[0].partition("\n")[2]
        assert len(lead.split()) > 8, "a lead paragraph follows the title"

    @a_chapter
    def test_it_begins_with_its_objectives(self, text):
        overview = text.partition("## Overview")[2].partition("\n## ")[0]
        (box,) = re.findall(r"```\{admonition\} In this chapter\n:class: objectives\n(.*?)```", overview, re.DOTALL)
        assert re.findall(r"\*\*(.+?)\*\*", box)[:3] == ["You will learn", "You need", "Time"]

    @a_chapter
    def test_one_folded_note_says_what_is_behind_it(self, chapter):
        calls = [cell.source for cell in chapter if cell.cell_type == "code" and "provenance_note(" in cell.source]
        assert len(calls) == 1
        assert ast.unparse(ast.parse(calls[0]).body[-1]).startswith("Markdown(provenance_note(")

    @a_chapter
    def test_no_code_is_removed_but_the_line_for_colab(self, chapter):
        first, *others = [cell for cell in chapter if cell.cell_type == "code"]
        assert first == chapter[0] and first.metadata.tags == ["remove-cell"] and first.source == SETUP
        removed = [c.source for c in others if {"remove-input", "remove-cell"} & set(c.metadata.get("tags", []))]
        assert removed == []

    @a_chapter
    def test_each_exercise_has_one_folded_solution(self, path, text):
        exercises, solutions = directives(text, "exercise(?:-start)?"), directives(text, "solution(?:-start)?")
        assert list(exercises) == list(solutions) and all(label.startswith("ex-") for label in exercises)
        assert all(re.search("^:class: dropdown$", body, re.MULTILINE) for body in solutions.values())
        others = [p.read_text(encoding="utf-8") for p in (BOOK / "scripts").glob("*.py") if p != path]
        elsewhere = {label for other in others for label in re.findall(r"^# :label: (ex-\S+)", other, re.MULTILINE)}
        assert not elsewhere & set(exercises)
        if path.stem not in ("_template", "ledger"):  # the ledger is a page to look things up
            assert len(exercises) >= 5, "two quick questions, and three exercises"
            assert len(directives(text, "solution")) >= 2 and len(directives(text, "solution-start")) >= 2

    @a_chapter
    def test_the_code_of_a_solution_ends_with_an_assertion(self, chapter):
        code: list | None = None
        for cell in chapter:
            if cell.cell_type == "code":
                if code is not None:
                    assert not cell.metadata.get("tags")
                    code.append(cell.source)
            elif "{solution-start}" in cell.source:
                assert code is None
                code = []
            elif "{solution-end}" in cell.source:
                assert code and isinstance(ast.parse(code[-1]).body[-1], ast.Assert)
                code = None
        assert code is None


class TestColab:
    """The first cell of a chapter, and the file that it runs on Colab."""

    @pytest.fixture
    def colab(self, tmp_path, monkeypatch) -> list[list[str]]:
        """The programs that the file starts; cloning makes the folder of the chapters."""
        commands: list[list[str]] = []

        def run(command, check):
            assert check
            commands.append(command)
            (tmp_path / "nucseg/book/chapters").mkdir(parents=True, exist_ok=True)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.chdir(tmp_path)
        return commands

    def test_the_cell_runs_the_file_of_the_books_repository(self):
        about = CONFIG["repository"]
        raw = about["url"].replace("https://github.com/", "https://raw.githubusercontent.com/")
        assert re.findall(r'"(https:\S+?)"', SETUP) == [f"{raw}/{about['branch']}/{about['path_to_book']}/colab.py"]
        assert (BOOK / "colab.py").exists() and about["url"] == load(BOOK / "colab.py").URL

    def test_elsewhere_nothing_is_fetched(self, colab, monkeypatch):
        monkeypatch.setattr("urllib.request.urlopen", lambda url: pytest.fail(url))
        exec(SETUP, {})
        load(BOOK / "colab.py")
        assert colab == []

    def test_on_colab_it_clones_installs_and_enters_the_folder_once(self, colab, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
        monkeypatch.setattr("urllib.request.urlopen", lambda url: (BOOK / "colab.py").open("rb"))
        exec(SETUP, {})
        assert [command[1] for command in colab] == ["clone", "-m"] and colab[0][-1] == CONFIG["repository"]["url"]
        assert Path.cwd() == tmp_path / "nucseg/book/chapters"
        exec(SETUP, {})
        assert len(colab) == 2 and Path.cwd() == tmp_path / "nucseg/book/chapters"
        monkeypatch.chdir(tmp_path)  # a restarted kernel begins above the clone
        exec(SETUP, {})
        assert [command[1] for command in colab] == ["clone", "-m", "-m"]


class TestSync:
    @pytest.fixture
    def pair(self, tmp_path) -> tuple[Path, Path]:
        shutil.copy(ROOT / "jupytext.toml", tmp_path)
        for folder in ("chapters", "scripts"):
            (tmp_path / "book" / folder).mkdir(parents=True)
        pair = (tmp_path / "book/chapters/x.ipynb", tmp_path / "book/scripts/x.py")
        pair[1].write_text(
            '# %% [markdown]\n# # A title\n\n# %% tags=["hide-input"]\na = 1\n\n# %%\na = 1\n', encoding="utf-8"
        )
        assert sync.sync(*pair) == "x.ipynb from x.py"
        return pair

    def edit(self, notebook: Path, **changes) -> None:
        content = json.loads(notebook.read_text(encoding="utf-8"))
        content["cells"][1] |= changes
        notebook.write_text(json.dumps(content), encoding="utf-8")

    def test_in_agreement_nothing_is_written(self, pair):
        before = [path.stat().st_mtime_ns for path in pair]
        assert sync.sync(*pair) == "" == sync.difference(*pair)
        assert [path.stat().st_mtime_ns for path in pair] == before

    def test_a_changed_twin_wins_whatever_the_dates(self, pair):
        notebook, twin = pair
        twin.write_text(twin.read_text().replace("a = 1", "b = 2"), encoding="utf-8")
        os.utime(twin, (1, 1))
        assert "x.ipynb and x.py differ" in sync.difference(*pair)
        assert sync.sync(*pair) == "x.ipynb from x.py"
        assert "b = 2" in notebook.read_text() and sync.difference(*pair) == ""

    def test_a_changed_notebook_wins_whatever_the_dates(self, pair):
        notebook, twin = pair
        self.edit(notebook, source=["c = 3"])
        os.utime(notebook, (1, 1))
        assert sync.sync(*pair) == "x.py from x.ipynb"
        assert "c = 3" in twin.read_text() and '# %% tags=["hide-input"]' in twin.read_text()
        assert sync.difference(*pair) == ""

    def test_a_run_of_the_notebook_is_no_change_of_it(self, pair):
        notebook, twin = pair
        before = twin.read_bytes()
        output = {"output_type": "stream", "name": "stdout", "text": ["hello"]}
        self.edit(notebook, outputs=[output], execution_count=3)
        assert "outputs" in sync.difference(*pair)
        assert sync.sync(*pair) == "x.ipynb from x.py"
        assert "hello" not in notebook.read_text() and twin.read_bytes() == before

    def test_captions_and_folds_are_made_for_the_notebook_alone(self, pair):
        notebook, twin = pair
        figure = '# %% mystnb={"figure": {"caption": "A dot. Image: {{ tissue }}.", "name": "fig-x"}}\nplt.show()\n'
        fence = "\n# %%%% [markdown]\n# ```{solution-%s} ex-x\n# ```\n"
        twin.write_text(figure + fence % "start" + "\n# %%\nb = 2\n" + fence % "end" + "\n# %%\nc = 3\n")
        before = twin.read_bytes()
        sync.sync(*pair)
        cells = nbformat.read(notebook, as_version=4).cells
        assert cells[1].source == "> **Figure.** A dot. Image: see *Behind this page*."
        assert [cell.source for cell in cells if "jupyter" in cell.metadata] == ["b = 2"]
        notebook.write_text(notebook.read_text().replace("c = 3", "c = 4"))
        assert sync.sync(*pair) == "x.py from x.ipynb"
        assert twin.read_bytes().endswith(before.replace(b"c = 3", b"c = 4")[-100:])
        assert "> **Figure" not in twin.read_text() and "source_hidden" not in twin.read_text()

    def test_captions_that_an_editor_wrote_into_the_twin_are_taken_out(self, pair):
        twin = pair[1]
        clean = twin.read_text()
        twin.write_text(clean + '\n# %% [markdown] tags=["caption", "remove-cell"]\n# > **Figure.** A dot.\n')
        assert "captions" in sync.difference(*pair)
        assert sync.sync(*pair) == "x.ipynb from x.py"
        assert "caption" not in twin.read_text() and sync.difference(*pair) == ""

    def test_two_changes_are_left_for_a_person_to_settle(self, pair):
        notebook, twin = pair
        self.edit(notebook, source=["c = 3"])
        twin.write_text(twin.read_text().replace("a = 1", "b = 2"), encoding="utf-8")
        before = notebook.read_bytes(), twin.read_bytes()
        with pytest.raises(SystemExit, match="both changed"):
            sync.sync(*pair)
        assert (notebook.read_bytes(), twin.read_bytes()) == before

    def test_a_missing_one_is_made_from_the_other(self, pair):
        notebook, twin = pair
        texts = notebook.read_bytes(), twin.read_bytes()
        notebook.unlink()
        assert "x.ipynb is missing" in sync.difference(*pair)
        sync.sync(*pair)
        twin.unlink()
        assert "x.py is missing" in sync.difference(*pair)
        sync.sync(*pair)
        assert (notebook.read_bytes(), twin.read_bytes()) == texts

    def test_cell_ids_depend_on_the_cells_alone(self, pair):
        ids = [cell.id for cell in sync.read(pair[1]).cells]
        assert len(set(ids)) == 3  # although two cells have the same text
        pair[1].write_text("# %%\nnew = 0\n\n" + pair[1].read_text(), encoding="utf-8")
        assert [cell.id for cell in sync.read(pair[1]).cells][1:] == ids

    def test_check_exits_1_and_changes_nothing(self, pair, monkeypatch, capsys):
        notebook, twin = pair
        monkeypatch.setattr(sync, "pairs", lambda: [pair])
        assert sync.main(["--check"]) == 0
        twin.write_text(twin.read_text() + "\n# %%\nmore = 1\n", encoding="utf-8")
        before = notebook.read_bytes()
        assert sync.main(["--check"]) == 1
        assert "x.ipynb and x.py differ" in capsys.readouterr().err and notebook.read_bytes() == before
        assert sync.main([]) == 0 and sync.main(["--check"]) == 0

    def test_templates_have_no_notebook(self, tmp_path):
        for folder in ("chapters", "scripts"):
            (tmp_path / folder).mkdir()
        (tmp_path / "scripts" / "_template.py").touch()
        (tmp_path / "scripts" / "a.py").touch()
        (tmp_path / "chapters" / "b.ipynb").touch()
        assert [(n.name, t.name) for n, t in sync.pairs(tmp_path)] == [("a.ipynb", "a.py"), ("b.ipynb", "b.py")]


class TestBuild:
    @pytest.fixture
    def tree(self, tmp_path) -> Path:
        for name in ("nucseg/a.py", "nucseg/assets/t.csv", "results/s/r/run.json"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("1")
        return tmp_path

    @pytest.mark.parametrize("name", ["nucseg/a.py", "nucseg/assets/t.csv", "results/s/r/run.json"])
    def test_the_fingerprint_sees_a_change_of_what_notebooks_read(self, tree, name):
        before = build.fingerprint(tree, "")
        (tree / name).write_text("2")
        assert build.fingerprint(tree, "") != before

    def test_it_sees_new_files_and_other_data_but_not_caches_or_dates(self, tree):
        before = build.fingerprint(tree, "")
        assert build.fingerprint(tree, "/somewhere") != before
        (tree / "nucseg/__pycache__").mkdir()
        (tree / "nucseg/__pycache__/a.pyc").write_text("x")
        os.utime(tree / "nucseg/a.py", (1, 1))
        assert build.fingerprint(tree, "") == before
        (tree / "nucseg/b.py").touch()
        assert build.fingerprint(tree, "") != before

    def test_what_is_kept_between_builds_and_that_the_exit_code_is_passed_on(self, tree, monkeypatch, capsys):
        monkeypatch.setattr(build, "BUILD", tree / "book/_build")
        monkeypatch.setattr(build, "fingerprint", lambda: fingerprint)
        monkeypatch.setattr(build, "problems", lambda html: broken)
        cache, parsed = tree / "book/_build/.jupyter_cache", tree / "book/_build/.doctrees"
        commands = []

        def build_with(code: int) -> tuple[int, bool, bool]:
            """(exit code, whether outputs were there to use, whether parsed pages are left)."""

            def run(command, **_):
                commands.append(command)
                used = cache.exists()
                for folder in (cache, parsed):
                    folder.mkdir(parents=True, exist_ok=True)
                commands.append(used)
                return subprocess.CompletedProcess(command, code)

            monkeypatch.setattr(build.subprocess, "run", run)
            return build.main(), commands[-1], parsed.exists()

        fingerprint, broken = "a", []
        assert build_with(0) == (0, False, True)
        assert {"-W", "--keep-going"} <= set(commands[0])
        assert build_with(0) == (0, True, True)
        assert build_with(3) == (3, True, False)  # so that the next build meets the same warnings
        assert build_with(0) == (0, True, True)
        fingerprint = "b"
        assert build_with(0) == (0, False, True)
        broken = ["a.html refers to b.html, which does not exist"]
        assert build_with(0) == (1, True, True) and broken[0] in capsys.readouterr().err


@pytest.fixture(scope="module")
def offline() -> ModuleType:
    pytest.importorskip("latex2mathml")
    pytest.importorskip("sphinx")
    return load(BOOK / "_ext" / "offline.py")


class TestOffline:
    @pytest.mark.parametrize(("after", "joined"), [(". On", True), (" and", False), ("", False)])
    def test_a_full_stop_stays_with_its_formula(self, offline, after, joined):
        nodes = pytest.importorskip("docutils.nodes")
        formula = nodes.math("", "B")
        nodes.paragraph("", "", formula, *([nodes.Text(after)] if after else []))
        page = SimpleNamespace(body=[])
        with pytest.raises(nodes.SkipNode):
            offline.visit_inline(page, formula)
        assert page.body[0].endswith("\N{WORD JOINER}") == joined

    def test_a_formula_becomes_mathml(self, offline):
        element = ElementTree.fromstring(offline.mathml(r"W_0 x + \frac{\alpha}{r} B A x", "block"))
        assert element.tag == "{http://www.w3.org/1998/Math/MathML}math" and element.get("display") == "block"
        assert "".join(element.itertext()) == "W0x+αrBAx"

    @pytest.mark.parametrize("latex", [r"\unknowncommand x", r"\frac{1", r"x^"])
    def test_one_that_would_come_out_half_converted_stops_the_build(self, offline, latex):
        from sphinx.errors import SphinxError

        with pytest.raises(SphinxError, match="Formula"):
            offline.mathml(latex, "inline")

    def test_all_formulas_of_the_book_convert(self, offline):
        text = (BOOK / "intro.md").read_text(encoding="utf-8")
        for path in NOTEBOOKS:
            text += "\n\n".join(cell.source for cell in cells(path, "markdown")) + "\n\n"
        found = re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL) + re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", text)
        assert found
        for latex in found:
            offline.mathml(latex, "inline")

    def test_nothing_is_configured_to_come_from_elsewhere(self):
        config = CONFIG["sphinx"]["config"]
        assert config["html_math_renderer"] == "mathml" and config["nb_ipywidgets_js"] == {}
        assert "thebe" not in CONFIG["launch_buttons"]

    def test_built_pages_load_nothing_from_elsewhere(self):
        pages = sorted((BOOK / "_build" / "html").rglob("*.html"))
        if not pages:
            pytest.skip("the book is not built")
        for page in pages:
            html = page.read_text(encoding="utf-8")
            loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]+)", html)
            loaded += re.findall(r"<link\b[^>]*rel=\"(?:stylesheet|preload|icon)\"[^>]*href=\"([^\"]+)", html)
            assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page.name
            assert not re.search(r"mathjax@|unpkg\.com|cdn\.jsdelivr|requirejs", html), page.name


class TestPlumbing:
    def test_the_links_at_the_top_are_relative_and_lead_to_the_book(self):
        for name in ("_config.yml", "_toc.yml"):
            link = ROOT / name
            if not link.is_symlink():
                pytest.skip("this checkout has no symbolic links")
            assert os.readlink(link) == f"book/{name}" and link.resolve() == BOOK / name

    def test_a_failing_cell_and_a_warning_stop_the_build(self):
        assert CONFIG["execute"]["raise_on_error"] is True and CONFIG["execute"]["execute_notebooks"] == "cache"
        assert CONFIG["only_build_toc_files"] is True

    def test_what_is_cited_is_in_the_one_bibliography(self):
        keys = set(re.findall(r"^@\w+\{(\w+),", (BOOK / "references.bib").read_text(encoding="utf-8"), re.MULTILINE))
        texts = [path.read_text(encoding="utf-8") for path in (*BOOK.glob("*.md"), *BOOK.glob("scripts/*.py"))]
        cited = {
            key for text in texts for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text) for key in keys.split(",")
        }
        assert cited <= keys and {"hu2021lora", "mahbod2024nuinsseg"} <= cited
        assert sum(text.count("```{bibliography}") for text in texts) == 1

    def test_conda_installs_what_pyproject_says_and_nothing_else(self):
        content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
        names = [d.split("=")[0] for d in content["dependencies"] if isinstance(d, str)]
        (pip,) = (d["pip"] for d in content["dependencies"] if isinstance(d, dict))
        assert names == ["python", "pip"] and pip == ["-e .[book]"]


class TestGlossary:
    TERMS = count_cells.glossary_terms()

    def test_it_is_in_order_and_long_enough(self):
        assert len(self.TERMS) >= 40 and len(set(self.TERMS)) == len(self.TERMS)
        assert sorted(self.TERMS, key=str.lower) == self.TERMS

    @pytest.mark.parametrize("path", [*BOOK.glob("*.md"), *BOOK.glob("scripts/*.py")], ids=lambda p: p.stem)
    def test_every_term_that_a_page_links_is_defined(self, path):
        known = {term.lower() for term in self.TERMS}
        text = re.sub(r"\n(?:# )?", " ", path.read_text(encoding="utf-8"))  # a link may run over two lines
        used = [re.sub(r".*<(.+)>", r"\1", link) for link in re.findall(r"\{term\}`([^`]+)`", text)]
        assert {term for term in used if term.lower() not in known} == set()


class TestCounts:
    """What the book's chapters hold, counted as ``tools/count_cells.py`` prints it."""

    @pytest.fixture
    def counts(self) -> count_cells.Counts:
        """The sum over the chapters in their final shape."""
        ready = [path for path in count_cells.twins() if path.stem not in NOT_YET]
        if not ready:
            pytest.skip("no chapter is in its final shape yet")
        return sum(map(count_cells.count, ready), count_cells.Counts())

    def test_most_code_is_visible_and_none_removed(self, counts):
        assert counts.removed == 0
        assert counts.visible >= 0.6 * (counts.visible + counts.folded)

    def test_no_words_stand_in_f_strings(self, counts):
        assert counts.words_in_f_strings == 0

    def test_there_are_exercises_with_solutions(self, counts):
        assert counts.exercises == counts.solutions and (NOT_YET or counts.exercises >= 30)

    def test_cells_are_counted_by_what_a_reader_sees(self, tmp_path):
        heads = ["", ' tags=["hide-input"]', ' tags=["remove-input"]', ' tags=["hide-input", "remove-output"]', ""]
        body = "f'Of {n} images here were {m} in one of the folds'"
        text = SETUP_CELL + "".join(f"# %%{head}\n1\n\n" for head in heads) + f"# %%\n{body}\n\n"
        text += "# %% [markdown]\n# ```{exercise} A\n# :label: ex-a\n# Why {term}`rank`?\n# ```\n"
        (tmp_path / "x.py").write_text(text, encoding="utf-8")
        assert count_cells.count(tmp_path / "x.py") == count_cells.Counts(3, 2, 1, 9, 1, 0, 1)
