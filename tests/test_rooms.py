"""The rooms of the package and the order of their imports: a lower room never imports from a higher one."""

import ast
import subprocess
import sys
from pathlib import Path

import nucseg

PACKAGE = Path(nucseg.__file__).parent
# Lowest first. Modules and rooms on one line stand on one floor and do not import each other.
FLOORS = (
    ("errors",),
    ("config", "files"),
    ("instances", "metrics"),
    ("images",),
    ("data",),
    ("model",),
    ("records",),
    ("inference",),
    ("training",),
    ("studies",),
    ("viz",),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
HEAVY = {"torch", "torchvision", "timm", "mobile_sam", "pandas", "scipy", "skimage", "matplotlib"}


def room(module: str) -> str:
    """``nucseg.data.synth`` -> ``data``; ``nucseg`` itself -> ````."""
    return [*module.split("."), ""][1]


def imports(path: Path) -> set[str]:
    """The modules of nucseg that a file imports anywhere, also inside functions and for annotations alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("nucseg.")}


def test_no_room_imports_from_a_higher_one():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if mine == "__init__":
            continue  # the public API names the rooms without importing them
        for other in map(room, imports(path)):
            if other in FLOOR and other != mine and FLOOR[other] >= FLOOR[mine]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports from {other}")
    assert not wrong


def test_no_module_is_in_an_import_circle():
    modules = {
        ".".join(("nucseg", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in PACKAGE.rglob("*.py")
    }
    arrows = {name: set() for name in modules}
    for name, path in modules.items():
        for target in imports(path):
            arrows[name] |= {m for m in (target, target.rpartition(".")[0]) if m in modules and m != name}
    done: set[str] = set()
    while free := {name for name in arrows.keys() - done if arrows[name] <= done | {"nucseg"}}:
        done |= free
    assert done | {"nucseg"} >= modules.keys(), sorted(modules.keys() - done)


def test_every_room_says_what_lives_in_it():
    top = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(top) <= 8, top
    for folder in PACKAGE.iterdir():
        if (folder / "__init__.py").exists():
            assert folder.name in FLOOR
            text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
            assert text and len(text) > 40, folder.name


def test_nucseg_and_its_help_wait_for_nothing_heavy():
    script = (
        "import sys, contextlib, io, nucseg\n"
        f"heavy = {HEAVY!r}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from nucseg.cli import main\n"
        "for words in (['--help'], ['train', '--help'], ['predict', '--help'], ['finetune', '--help']):\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main(words)\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_public_api_is_what_it_says():
    for name in nucseg.__all__:
        assert getattr(nucseg, name) is not None
    assert set(dir(nucseg)) == set(nucseg.__all__)
    try:
        nucseg.nothing  # noqa: B018
    except AttributeError as error:
        assert "nothing" in str(error)
    else:
        raise AssertionError("an unknown name was found")
