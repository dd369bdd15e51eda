"""The book beyond its chapters: the check of links, the reference pages, the citation, the workflows."""

import html
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import nucseg
from nucseg.data.synth import generate
from nucseg.records.runs import results_folder, study_runs

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "book"
HTML = BOOK / "_build" / "html"
if not BOOK.is_dir():
    pytest.skip("the book is not part of an installed package", allow_module_level=True)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


links = load(BOOK / "links.py")


class TestLinks:
    @pytest.fixture
    def site(self, tmp_path) -> Path:
        """A front page that leads on to another one, all in order."""
        for name, text in {
            "index.html": '<meta http-equiv="Refresh" content="0; url=intro.html">',
            "intro.html": '<h1 id="top">x</h1><a href="a%20b/page.html#caf%C3%A9">on</a> <a href="https://x.org/y">out</a>'
            '<a href="mailto:a@x.org">mail</a><img src="data:image/png;base64,AA=="><a href="#top">up</a>'
            '<link rel="stylesheet" href="_static/s.css?v=1"><link rel="canonical" href="https://x.org/">',
            "a b/page.html": '<p id="café"><a href="../intro.html"><img src="../i.png" srcset="../i.png 2x"></a></p>',
            "_static/s.css": "@font-face { src: url('fonts/f.woff') } p { background: url(data:image/png;base64,A) }",
            "_static/fonts/f.woff": "",
            "i.png": "",
            "left-over.html": '<a href="nowhere.html">from a build before, which no page leads to</a>',
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    def test_a_book_in_order_has_no_problems(self, site):
        assert links.problems(site) == []

    @pytest.mark.parametrize(
        ("html", "told"),
        [
            ('<a href="missing.html">', "missing.html, which does not exist"),
            ('<a href="Page.html">', "Page.html, which does not exist"),
            ('<a href="../intro.html#no">', "../intro.html#no, an anchor"),
            ('<a href="#no">', "#no, an anchor"),
            ('<img src="no.png">', "no.png, which does not exist"),
            ('<img srcset="../i.png, no.png 2x">', "no.png, which does not exist"),
            ('<script src="https://x.org/s.js"></script>', "loads https://x.org/s.js"),
            ('<img src="//x.org/i.png">', "loads //x.org/i.png"),
            ('<iframe src="https://x.org"></iframe>', "loads https://x.org"),
            ('<link rel="preload" href="https://x.org/f">', "loads https://x.org/f"),
            ('<style>@import "https://x.org/s.css";</style>', "loads https://x.org/s.css"),
            ('<p style="background: url(https://x.org/b.png)">', "loads https://x.org/b.png"),
        ],
    )
    def test_what_is_wrong_is_told_with_the_page(self, site, html, told):
        page = site / "a b" / "page.html"
        page.write_text(page.read_text(encoding="utf-8") + html, encoding="utf-8")
        (found,) = links.problems(site)
        assert found.startswith("a b/page.html ") and told in found

    def test_style_sheets_are_looked_into(self, site):
        (site / "_static" / "s.css").write_text("p { background: url(//x.org/f.woff) }")
        assert links.problems(site) == ["_static/s.css loads //x.org/f.woff, which is not of the book"]

    def test_no_book_is_a_problem(self, tmp_path):
        assert "no index.html" in links.problems(tmp_path)[0]

    def test_the_built_book_has_none(self):
        if not HTML.is_dir():
            pytest.skip("the book is not built")
        assert links.problems(HTML) == []


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    pytest.importorskip("sphinx")
    return load(BOOK / "_ext" / "reference.py")


class TestReference:
    @pytest.mark.parametrize(
        ("docstring", "rest"),
        [
            ("2 |T| / ``|P|``", r"2 \|T\| / ``|P|``"),
            ("±``degrees``, (``a``) ``b``", r"±\ ``degrees``, (``a``) ``b``"),
            ("(H, W) -> ``a -> b``", "(H, W) → ``a -> b``"),
            ("Raises ``InputError`` for ``labels``, ``TRUTH``", "Raises `InputError` for ``labels``, ``TRUTH``"),
            ("A |b|.\n\n>>> a | b\n1\n\nC |d|.", "A \\|b\\|.\n\n>>> a | b\n1\n\nC \\|d\\|."),
        ],
    )
    def test_prose_is_no_markup(self, reference, docstring, rest):
        assert reference.as_rest(docstring) == rest

    def test_every_option_has_its_reason(self, reference):
        from nucseg.config import Config, options

        assert list(reference.reasons(Config)) == list(options(Config))
        assert reference.reasons(int) == {} == reference.reasons(Path)

    def test_arguments_as_one_types_them(self, reference):
        import argparse

        parser = argparse.ArgumentParser()
        what = parser.add_argument("what", choices=["a", "b"], help="which")
        out = parser.add_argument("--out", default="here", choices=["here", "there"], required=True, help="100%% where")
        flag = parser.add_argument("-q", "--quiet", action="store_true", default=None, help="be so (default: no)")
        assert [reference.invocation(a) for a in (what, out, flag)] == ["a|b", "--out OUT", "-q, --quiet"]
        assert reference.explanation(what) == "which"
        assert reference.explanation(out) == "100% where: here, there (default: here) (required)"
        assert reference.explanation(flag) == "be so (default: no)"
        switch = parser.add_argument("--switch", action="store_true", help="turn it on")
        number = parser.add_argument("--number", default=0, help="how many")
        assert reference.explanation(switch) == "turn it on"
        assert reference.explanation(number) == "how many (default: 0)"

    def test_names_of_extras_are_no_toml_tables(self, reference):
        words = reference.prose("Needs nucseg[export], the table [slurm] and --out.").children
        assert [w.astext() for w in words[1::2]] == ["[slurm]", "--out"]

    def test_pip_commands_are_code(self, reference):
        words = reference.prose("Needs pip install 'nucseg[export]'.").children
        assert [w.astext() for w in words[1::2]] == ["pip install 'nucseg[export]'"]

    def test_every_module_is_on_one_page_and_in_the_list(self):
        paths = [path.relative_to(ROOT / "nucseg") for path in (ROOT / "nucseg").rglob("*.py")]
        paths = [path for path in paths if "chapters" not in path.parts]  # helpers of one chapter each
        modules = [".".join(path.with_suffix("").parts) for path in paths if not path.name.startswith("__")]
        pages = "".join(path.read_text(encoding="utf-8") for path in sorted((BOOK / "api").glob("*.md")))
        documented = re.findall(r"^\.\. automodule:: nucseg\.([\w.]+)$", pages, re.MULTILINE)
        listed = re.findall(r"^```\{modules\} (.+)$", (BOOK / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
        assert sorted(documented) == sorted(modules) == sorted(" ".join(listed).split())

    def test_every_page_is_in_the_table_of_contents(self):
        toc = (BOOK / "_toc.yml").read_text(encoding="utf-8")
        for path in (*BOOK.glob("*.md"), *BOOK.glob("api/*.md")):
            name = path.relative_to(BOOK).with_suffix("").as_posix()
            assert re.search(rf"(root|- file): {name}$", toc, re.MULTILINE), name

    def test_the_built_pages_have_every_command_and_option(self):
        if not (HTML / "cli.html").exists():
            pytest.skip("the book is not built")
        from nucseg.cli import _parser
        from nucseg.config import Config, options

        html = (HTML / "cli.html").read_text(encoding="utf-8")
        commands = re.findall(r"^    ([a-z-]+) ", _parser().format_help(), re.MULTILINE)
        assert len(commands) > 5
        for command in commands:
            assert f'id="nucseg-{command}"' in html
        for option in options(Config):
            assert f"--{option.replace('_', '-')}" in html
        evaluate = html[html.index('id="nucseg-evaluate"') : html.index('id="nucseg-predict"')]
        assert "--threshold THRESHOLD" in re.sub("<[^>]+>", "", evaluate)  # it has some of the names, not the options
        assert "[OPTION" not in evaluate
        assert "SUPPRESS" not in html  # an option without a help text is not for users


class TestTopLevel:
    def test_it_has_what_it_should(self):
        for name in ("book", "nucseg", "tests", "environment.yml", "README.md", "LICENSE", "LICENSE-TEXT"):
            assert (ROOT / name).exists(), name

    def test_the_citation_says_what_pyproject_says(self):
        cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software")
        assert (cited["title"], cited["version"], cited["license"]) == (
            project["name"],
            nucseg.__version__,
            project["license"],
        )
        assert cited["authors"] == project["authors"] and cited["keywords"] == project["keywords"]
        config = yaml.safe_load((BOOK / "_config.yml").read_text(encoding="utf-8"))
        assert cited["repository-code"] == config["repository"]["url"]

    def test_its_references_are_those_of_the_book(self):
        entries = (BOOK / "references.bib").read_text(encoding="utf-8")
        for work in yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]:
            where = work.get("doi") or work["identifiers"][0]["value"]
            (entry,) = [text for text in entries.split("\n\n") if where in text]
            assert [author["family-names"] for author in work["authors"]] == re.findall(
                r"(?:and|\{)\s*([^,{}]+), ", re.search(r"author\s*= (\{.+\})", entry)[1]
            )

    def test_workflows_have_least_permissions_and_run_targets_that_exist(self):
        targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        paths = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
        assert [path.stem for path in paths] == ["ci", "links", "publish"]
        for path in paths:
            text = path.read_text(encoding="utf-8")
            workflow = yaml.safe_load(text)
            assert workflow["permissions"] == {"contents": "read"}
            assert set(re.findall(r"make (\w+)", text)) <= targets
            for test in re.findall(r"tests/\w+\.py", text):
                assert (ROOT / test).exists(), test
            for uses in re.findall(r"uses: (\S+)", text):
                assert re.fullmatch(r"actions/[\w-]+@v\d+", uses), uses


class TestPublishing:
    @pytest.fixture
    def steps(self) -> list[dict]:
        text = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
        return yaml.safe_load(text)["jobs"]["build"]["steps"]

    def test_the_preview_is_cached_by_its_list_and_fetched_before_the_build(self, steps):
        runs = [step.get("run", "") for step in steps]
        fetch = next(k for k, run in enumerate(runs) if "fetch nuinsseg --preview" in run)
        cache = next(k for k, step in enumerate(steps) if step.get("uses", "").startswith("actions/cache@"))
        assert runs.index("make install PYTHON=python") < fetch and cache < fetch < runs.index(
            "make book PYTHON=python"
        )
        folder = steps[cache]["with"]["path"]
        assert f"--out {folder}" in runs[fetch] and f"$PWD/{folder}" in runs[fetch]
        (pinned,) = re.findall(r"hashFiles\('(.+?)'\)", steps[cache]["with"]["key"])
        assert (ROOT / pinned).is_file() and Path(pinned).name == "nuinsseg_preview.csv"

    @pytest.mark.skipif(os.name != "posix" or not shutil.which("bash"), reason="the workflow runs on Linux")
    @pytest.mark.parametrize("code", [0, 1, 2])
    def test_a_failed_fetch_is_a_warning_and_the_build_goes_on(self, steps, tmp_path, code):
        """The step itself, run with a Python that does nothing but exit."""
        (script,) = [step["run"] for step in steps if "fetch nuinsseg --preview" in step.get("run", "")]
        python = tmp_path / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\necho "$@"\nexit {code}\n')
        python.chmod(0o755)
        exported = tmp_path / "env"
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
            cwd=tmp_path,
            env={**os.environ, "GITHUB_ENV": str(exported)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0
        assert "-m nucseg fetch nuinsseg --preview" in done.stdout
        if code:
            assert "::warning::" in done.stdout and "synthetic tissue" in done.stdout and not exported.exists()
        else:
            assert exported.read_text() == f"NUCSEG_DATA={tmp_path}/data/nuinsseg-preview\n"
            assert "::warning::" not in done.stdout

    def test_captions_name_the_source_of_this_build(self, tmp_path, monkeypatch):
        pytest.importorskip("myst_nb")
        settings = yaml.safe_load((BOOK / "_config.yml").read_text(encoding="utf-8"))
        assert settings["sphinx"]["local_extensions"]["attribution"] == "_ext"
        assert "substitution" in settings["parse"]["myst_enable_extensions"]
        (tmp_path / "conf.py").write_text(
            f"import sys; sys.path.insert(0, {str(BOOK / '_ext')!r})\n"
            "extensions = ['myst_nb', 'attribution']\n"
            "myst_enable_extensions = ['substitution']\n"
        )
        (tmp_path / "index.md").write_text(
            "# A page\n\n```{figure} a.png\nCells. Images: {{ tissue }}.\n```\n\nA literal `{{ tissue }}` stays.\n"
        )
        (tmp_path / "a.png").write_bytes(b"")
        build = [sys.executable, "-m", "sphinx", "-qEWb", "html", str(tmp_path), str(tmp_path / "out")]
        environment = {**os.environ, "NUCSEG_DATA": "x", "PYTHONPATH": str(ROOT)}  # the folder is not opened
        done = subprocess.run(build, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        text = re.sub("<[^>]+>", "", (tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
        assert "Cells. Images: NuInsSeg (Mahbod et al. 2024), CC BY 4.0." in text
        assert "A literal {{ tissue }} stays." in text


class TestSmallPictures:
    """PNGs become WebPs where that is smaller, and the pages follow."""

    @pytest.fixture
    def publish(self) -> ModuleType:
        pytest.importorskip("sphinx")
        return load(BOOK / "_ext" / "publish.py")

    def png(self, pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    def test_a_drawing_keeps_every_pixel(self, publish):
        pixels = np.full((200, 300, 4), 255, np.uint8)
        pixels[50:60], pixels[:, 70, 1], pixels[100:, :, 3] = (200, 30, 30, 255), 0, 0  # a part is transparent
        png = self.png(pixels)
        small = publish.webp(png)
        opaque = pixels[..., 3] > 0
        assert len(small) < len(png)
        assert (np.asarray(Image.open(io.BytesIO(small)).convert("RGBA"))[opaque] == pixels[opaque]).all()

    def test_a_photograph_becomes_much_smaller_and_looks_the_same(self, publish):
        image = generate("human placenta", 3, 256).image
        png = self.png(image)
        small = publish.webp(png)
        error = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).astype(float) - image
        assert len(small) < 0.5 * len(png) and np.sqrt((error**2).mean()) < 6

    def test_pages_show_what_was_shrunk(self, publish, tmp_path):
        (tmp_path / "_images").mkdir()
        (tmp_path / "chapters").mkdir()
        (tmp_path / "_images" / "a.png").write_bytes(self.png(np.zeros((99, 99, 3), np.uint8)))
        (tmp_path / "_images" / "b.svg").touch()
        page = tmp_path / "chapters" / "x.html"
        page.write_text('<img src="../_images/a.png"><img src="../_images/b.svg">', "utf-8")
        publish.shrink(tmp_path)
        publish.shrink(tmp_path)  # as a second build does
        assert page.read_text("utf-8") == '<img src="../_images/a.webp"><img src="../_images/b.svg">'
        assert sorted(p.name for p in (tmp_path / "_images").iterdir()) == ["a.webp", "b.svg"]

    def test_a_picture_has_its_size_and_a_wide_one_a_class(self, publish, tmp_path):
        (tmp_path / "_images").mkdir()
        (tmp_path / "_images" / "a.png").write_bytes(self.png(np.zeros((50, 99), np.uint8)))
        (tmp_path / "_images" / "b.png").write_bytes(self.png(np.zeros((99, 99), np.uint8)))
        page = tmp_path / "x.html"
        page.write_text(
            '<img src="_images/a.png"><img class="c" src="_images/a.png"><img src="_images/b.png">', "utf-8"
        )
        publish.state_sizes(tmp_path)
        publish.state_sizes(tmp_path)
        assert page.read_text("utf-8") == (
            '<img class="wide" width="99" height="50" src="_images/a.png">'
            '<img width="99" height="50" class="wide c" src="_images/a.png">'
            '<img width="99" height="99" src="_images/b.png">'
        )

    def test_a_tall_picture_as_broad_as_the_page_is_wide_too(self, publish, tmp_path):
        (tmp_path / "_images").mkdir()
        (tmp_path / "_images" / "a.png").write_bytes(self.png(np.zeros((1200, 978), np.uint8)))
        page = tmp_path / "x.html"
        page.write_text('<img src="_images/a.png">', "utf-8")
        publish.state_sizes(tmp_path)
        assert page.read_text("utf-8") == '<img class="wide" width="978" height="1200" src="_images/a.png">'

    def test_an_interval_in_a_table_stays_in_one_line(self, publish):
        page = '<td>0.1 to 0.2</td><td id="T_a" >+0.1 (−0.1 to +0.3)</td><td id="T_b" >5 to come</td>'
        assert publish.keep_intervals(page) == (
            '<td>0.1 to 0.2</td><td id="T_a" >+0.1 (−0.1\xa0to\xa0+0.3)</td><td id="T_b" >5 to come</td>'
        )

    def test_the_zip_file_holds_the_notebooks_with_what_they_read(self, publish, tmp_path):
        publish.zip_notebooks(ROOT, tmp_path / "n.zip", "how to")
        with zipfile.ZipFile(tmp_path / "n.zip") as archive:
            names = archive.namelist()
            archive.extractall(tmp_path)
        notebooks = {f"nucseg-notebooks/book/chapters/{p.name}" for p in (BOOK / "chapters").glob("*.ipynb")}
        assert notebooks <= set(names) and (tmp_path / "nucseg-notebooks/README.txt").read_text() == "how to"
        folder = tmp_path / "nucseg-notebooks"
        assert results_folder(folder / "book" / "chapters") == folder / "results"
        assert set(study_runs("folds", folder / "results")["offline-small"]) == {f"fold_{n}" for n in range(1, 6)}

    def test_the_sitemap_lists_the_pages(self, publish):
        found = re.findall("<loc>(.*)</loc>", publish.sitemap("https://x.org/b/", ["a", "c/d"]))
        assert found == ["https://x.org/b/a.html", "https://x.org/b/c/d.html"]

    def test_a_card_says_what_the_page_is_about(self, publish):
        from docutils import nodes

        text = "How many nuclei & why: " + "a long sentence, " * 30
        tree = nodes.document(None, None, nodes.paragraph(text="Short."), nodes.paragraph(text=text))
        app = SimpleNamespace(config=SimpleNamespace(html_baseurl="https://x.org/", html_title="Book"))
        context = {"title": "A &amp; B"}
        publish.add_card(app, "chapters/a", "page.html", context, tree)
        card = dict(re.findall(r'property="og:(\w+)" content="([^"]*)"', context["metatags"]))
        assert card["title"] == "A &amp; B" and card["url"] == "https://x.org/chapters/a.html"
        assert card["description"].startswith("How many nuclei &amp; why: a long") and card["description"].endswith("…")
        assert len(html.unescape(card["description"])) <= 201


def test_header_cells_say_what_they_head():
    repair = load(BOOK / "_ext" / "accessible.py").repair
    table = '<table><thead><tr><th class="a">x</th></tr></thead><tbody><tr><th>y</th><td>1</td></tr></tbody></table>'
    found = repair(table)
    title = '<p class="admonition-title">Solution to<a href="#x"> Exercise 1</a></p>'
    assert repair(title) == '<p class="admonition-title">Solution to <a href="#x">Exercise 1</a></p>'
    assert repair(repair(title)) == repair(title)
    assert '<th scope="col" class="a">x' in found and '<th scope="row">y' in found and repair(found) == found


def test_a_build_repairs_its_pages(tmp_path):
    pytest.importorskip("sphinx")
    (tmp_path / "conf.py").write_text(
        f"import sys; sys.path.insert(0, {str(BOOK / '_ext')!r})\nextensions = ['accessible', 'tables']\n"
    )
    table = "<table><thead><tr><th>x</th></tr></thead><tbody><tr><td>-1</td></tr></tbody></table>"
    (tmp_path / "index.rst").write_text(f"Page\n====\n\n.. raw:: html\n\n   {table}\n")
    build = [sys.executable, "-m", "sphinx", "-qEWb", "html", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert '<th scope="col">x</th>' in page and "<td>−1</td>" in page


class TestTables:
    @pytest.fixture
    def repair(self):
        pytest.importorskip("sphinx")
        return load(BOOK / "_ext" / "tables.py").repair

    @pytest.mark.parametrize(
        ("cell", "expected"),
        [
            ("-0.013", "−0.013"),
            ("-0.001 (-0.007 to +0.005)", "−0.001 (−0.007 to +0.005)"),
            ("-.5", "−.5"),
            ("1e-4", "1e-4"),
            ("2024-05-17", "2024-05-17"),
            ("nuinsseg-1", "nuinsseg-1"),
            ("--jobs", "--jobs"),
        ],
    )
    def test_negative_numbers_have_a_minus_sign(self, repair, cell, expected):
        assert repair(f"<td>{cell}</td>") == f"<td>{expected}</td>"
        assert repair(f"<p>{cell}</p>") == f"<p>{cell}</p>"

    @pytest.mark.parametrize("tag", ["td", "th", "caption"])
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("the report's files", "the report’s files"),
            ("the folds' means", "the folds’ means"),
            ("['a', 'b']", "['a', 'b']"),
            ("'offline'", "'offline'"),
        ],
    )
    def test_apostrophes_are_curly(self, repair, tag, text, expected):
        assert repair(f'<{tag} class="x">{text}</{tag}>') == f'<{tag} class="x">{expected}</{tag}>'
        assert repair(f"<p>{text}</p>") == f"<p>{text}</p>"

    @pytest.mark.parametrize("styled", [False, True])
    @pytest.mark.parametrize("levels", [1, 2])
    def test_index_names_stand_beside_column_names(self, repair, styled, levels):
        table = pd.DataFrame({"a": [1, 2], "b": [3, 4], "x": [5, 6], "y": [7, 8]}).set_index(["a", "b"][:levels])
        html = table.style.to_html() if styled else table.to_html()
        found = repair(html)
        (head,) = re.findall(r"<thead>.*?</thead>", found, re.DOTALL)
        assert re.findall(r"<th\b[^>]*>(\w+)</th>", head) == ["a", "b", "x", "y"]
        assert html.count("<tr") == found.count("<tr") + 1 and repair(found) == found

    def test_two_full_header_rows_stay(self, repair):
        table = pd.DataFrame({1: [0.5]}, index=pd.Index([2], name="rank")).rename_axis(columns="alpha")
        wide = pd.concat({"real": table, "here": table}, axis=1)
        for text in (table.to_html(), wide.to_html(), wide.style.to_html()):
            assert repair(text) == text

    def test_numbers_are_marked_where_no_index_is_shown(self, repair):
        table = pd.DataFrame(
            {
                "run": ["a", "LoRA 8"],
                "weights": ["6,240,110", "12"],
                "change": ["", "−0.1 (−0.2 to +0.1)"],
                "rate": ["3e-4", "12%"],
                "size": ["2 KiB", "3 KiB"],
                "none": ["", ""],
            }
        )
        found = repair(table.style.hide(axis="index").to_html())
        cells = re.findall(r'<t([hd])\b[^>]*class="number [^"]*\bcol(\d)\b', found)
        assert sorted(cells) == sorted([(kind, n) for n in "123" for kind in "hdd"])
        assert repair(found) == found
        for indexed in (table.style.to_html(), table.to_html()):
            assert "number" not in repair(indexed)


def test_printed_pages_are_joined_and_their_links_stay_within():
    pypdf = pytest.importorskip("pypdf")
    annotations = pytest.importorskip("pypdf.annotations")
    pytest.importorskip("playwright")
    pdf = load(BOOK / "pdf.py")

    def printed(links: list[str]) -> bytes:
        writer, file = pypdf.PdfWriter(), io.BytesIO()
        for _ in range(2):
            writer.add_blank_page(100, 100)
        for uri in links:
            writer.add_annotation(0, annotations.Link(rect=(0, 0, 9, 9), url=uri))
        writer.write(file)
        return file.getvalue()

    a, b, other = (pdf.HTML / name for name in ("a.html", "b c.html", "notebooks.zip"))
    links = [f"{b.as_uri()}#top", other.as_uri(), "https://example.org/"]
    pages = [(a, 0, "First", printed(links)), (b, 1, "Second", printed([]))]
    file = io.BytesIO()
    pdf.join(pages, "https://x.org/").write(file)
    book = pypdf.PdfReader(file)
    inside, outside, elsewhere = (note.get_object()["/A"] for note in book.pages[0]["/Annots"])
    assert inside["/S"] == "/GoTo" and book.get_page_number(inside["/D"][0].get_object()) == 2
    assert (outside["/URI"], elsewhere["/URI"]) == ("https://x.org/notebooks.zip", "https://example.org/")
    first, (second,) = book.outline
    assert (first.title, second.title, book.get_destination_page_number(second)) == ("First", "Second", 2)


def test_the_table_of_contents_is_printed_in_its_order():
    pytest.importorskip("pypdf")
    pytest.importorskip("playwright")
    toc = {"root": "a", "chapters": [{"file": "b", "sections": [{"file": "c"}]}, {"file": "d"}]}
    assert list(load(BOOK / "pdf.py").entries(toc)) == [("a", 0), ("b", 0), ("c", 1), ("d", 0)]
