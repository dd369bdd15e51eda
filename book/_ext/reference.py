"""The reference pages, generated from the package: docstrings, options of a run, and the command line."""

import argparse
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

# ---------------------------------------------------------------- docstrings


def as_rest(docstring: str) -> str:
    """Convert a docstring to reStructuredText; only backticks are treated as markup."""
    blocks = re.split(r"(\n\s*\n)", docstring)
    return "".join(
        block if block.lstrip().startswith(">>>") else _prose(block)
        for block in blocks
    )


def _prose(block: str) -> str:
    parts = re.split(r"(``.+?``|`[^`]+`)", block, flags=re.DOTALL)
    for i, text in enumerate(parts):
        if i % 2:  # code; a CamelCase name such as ``InputError`` becomes a link
            parts[i] = re.sub(r"``([A-Z]\w*[a-z]\w*)``", r"`\1`", text)
        else:
            parted = i + 1 < len(parts) and re.search(r"[^\s'\"(\[{<\-/:]$", text)
            parts[i] = text.replace("|", r"\|").replace("->", "→")
            parts[i] += r"\ " if parted else ""
    return "".join(parts)


def tidy_docstring(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    app.env.note_dependency(__file__)  # autodoc tracks the module itself
    lines[:] = as_rest("\n".join(lines)).split("\n")
    if what == "class" and reasons(obj):
        lines += ["", f".. config-options:: {name}", ""]


def shorten_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    *signature: str | None,
) -> tuple[str, None] | None:
    """Remove the parameters of a protocol, and of a long dataclass, whose fields are listed below it."""
    if what != "class":
        return None
    if getattr(obj, "_is_protocol", False):
        return "", None
    many = dataclasses.is_dataclass(obj) and len(dataclasses.fields(obj)) > 12
    return ("(**options)", None) if many or reasons(obj) else None


def find_bare_name(
    app: Sphinx,
    env: BuildEnvironment,
    node: addnodes.pending_xref,
    content: nodes.Node,
) -> nodes.reference | None:
    """Link a bare name such as `read_image` to the one object of the package with that name."""
    target = node["reftarget"]
    if node.get("refdomain") != "py" or "." in target:
        return None
    objects = env.domains["py"].objects
    modules = {name for name, entry in objects.items() if entry.objtype == "module"}
    found = [
        f"{module}.{target}"
        for module in modules
        if f"{module}.{target}" in objects
    ]
    if len(found) != 1:
        return None
    entry = objects[found[0]]
    return make_refnode(
        app.builder,
        node["refdoc"],
        entry.docname,
        entry.node_id,
        [content],
        found[0],
    )


class Modules(SphinxDirective):
    """``modules:: metrics data.synth``: the modules with the first paragraph of their docstrings."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        return [definitions(map(self.module, self.arguments[0].split()))]

    def module(self, name: str) -> tuple[nodes.Node, list[nodes.Node]]:
        module = importlib.import_module(f"nucseg.{name}")
        made_from(self.env, module)
        link = addnodes.pending_xref(
            "",
            code(module.__name__),
            refdomain="py",
            reftype="mod",
            reftarget=module.__name__,
            refdoc=self.env.docname,
            refwarn=True,
        )
        first_paragraph = (inspect.getdoc(module) or "").split("\n\n")[0]
        text = StringList(as_rest(first_paragraph).split("\n"))
        words = nodes.Element()
        self.state.nested_parse(text, self.content_offset, words)
        return link, words.children


# ---------------------------------------------------------------- sources and nodes


def made_from(env: BuildEnvironment, *modules: ModuleType) -> None:
    """Rebuild the current page when one of the modules, or this file, changes."""
    for path in (__file__, *(module.__file__ for module in modules)):
        env.note_dependency(str(path))


def code(text: str) -> nodes.literal:
    return nodes.literal("", text)


def prose(text: str) -> nodes.paragraph:
    """A text of the program as a paragraph, with options, variables, TOML tables and pip commands as code."""
    pattern = r"(pip install '[^']+'|--\w[\w-]*|\$[A-Z]\w*|(?<!\w)\[[\w.]+\])"
    parts = re.split(pattern, text)
    return nodes.paragraph(
        "", "", *(code(t) if i % 2 else nodes.Text(t) for i, t in enumerate(parts))
    )


def definitions(
    pairs: Iterable[tuple[nodes.Node, list[nodes.Node]]],
) -> nodes.definition_list:
    items = [
        nodes.definition_list_item(
            "", nodes.term("", "", term), nodes.definition("", *body)
        )
        for term, body in pairs
    ]
    return nodes.definition_list("", *items, classes=["options"])


def table(rows: Iterable[tuple[str, Any, str]]) -> nodes.table:
    """A table of (option, default, help text) rows."""
    heads = [
        nodes.paragraph("", head) for head in ("Option", "Default", "What and why")
    ]
    lines = [
        [nodes.paragraph("", "", code(option)), _default(value), prose(reason)]
        for option, value, reason in rows
    ]
    head, *body = (
        nodes.row("", *(nodes.entry("", cell) for cell in line))
        for line in [heads, *lines]
    )
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in heads), cols=3)
    group += [nodes.thead("", head), nodes.tbody("", *body)]
    return nodes.table("", group, classes=["options", "colwidths-auto"])


def _default(value: Any) -> nodes.paragraph:
    return nodes.paragraph("", "", code(shown(value)))


def shown(value: Any) -> str:
    """A value as a user types it."""
    return "''" if value == "" else str(value)


# ---------------------------------------------------------------- the options of a run


def reasons(cls: Any) -> dict[str, dataclasses.Field]:
    """Fields of a configuration class by name, each with its help text; empty for any other class."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return {field.name: field for field in fields if "why" in field.metadata}


class ConfigOptions(SphinxDirective):
    """``config-options:: nucseg.config.ModelConfig``: the fields that the class adds, as a table."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, name = self.arguments[0].rsplit(".", 1)
        cls = getattr(importlib.import_module(module), name)
        base = cls.__mro__[1]
        words = nodes.paragraph("", "Its options:")
        if reasons(base):
            words = nodes.paragraph("", "Its options are those of ")
            words += [code(base.__name__), nodes.Text(", and:")]
        rows = [
            (option, field.default, field.metadata["why"])
            for option, field in reasons(cls).items()
            if option not in reasons(base)
        ]
        return [words, table(rows)]


# ---------------------------------------------------------------- the command line


def invocation(action: argparse.Action) -> str:
    """An argument as a user types it: ``--out OUT``, ``STUDY.toml``, ``nuinsseg|mobile_sam``."""
    if not action.option_strings:
        return str(
            action.metavar or "|".join(action.choices or [action.dest.upper()])
        )
    flags = ", ".join(action.option_strings)
    return (
        flags
        if action.nargs == 0
        else f"{flags} {action.metavar or action.dest.upper()}"
    )


def explanation(action: argparse.Action) -> str:
    """The help text of an argument with its choices, and its default if the text does not mention it."""
    words = (action.help or "").replace("%%", "%")
    if action.choices and action.option_strings:
        words += f": {', '.join(action.choices)}"
    unset = (
        action.default is None or action.default is False or action.default == []
    )
    if not unset and "default" not in words:
        words += f" (default: {action.default})"
    if action.required and action.option_strings:
        words += " (required)"
    return words


class CommandLine(SphinxDirective):
    """``command-line::``: all commands of ``nucseg`` with their arguments, read from the parser."""

    OF_A_RUN = "the-options-of-a-run"

    def run(self) -> list[nodes.Node]:
        from nucseg import cli, config

        made_from(self.env, cli, config)
        options = reasons(config.Config)
        commands = next(
            action.choices
            for action in cli._parser()._actions
            if isinstance(action, argparse._SubParsersAction)
        )
        flags = {a.dest: a.option_strings for a in commands["train"]._actions}
        rows = [
            (", ".join(flags[name]), field.default, field.metadata["why"])
            for name, field in options.items()
        ]
        sections = [
            self.command(command, set(options)) for command in commands.values()
        ]
        sections.append(
            self.section(self.OF_A_RUN, "The options of a run", table(rows))
        )
        named = definitions(
            (code(n), [changes(p)]) for n, p in config.PRESETS.items()
        )
        sections.append(self.section("the-presets", "The presets", named))
        return sections

    def command(
        self, command: argparse.ArgumentParser, of_a_run: set[str]
    ) -> nodes.section:
        takes_all = of_a_run <= {action.dest for action in command._actions}
        elsewhere = {"help"} | (of_a_run if takes_all else set())
        own = [
            a
            for a in command._actions
            if a.dest not in elsewhere and a.help is not argparse.SUPPRESS
        ]
        own.sort(
            key=lambda action: (bool(action.option_strings), not action.required)
        )
        words = [invocation(a) if a.required else f"[{invocation(a)}]" for a in own]
        also = []
        if takes_all:
            words.append("[OPTION ...]")
            link = nodes.reference("", "the options of a run", refid=self.OF_A_RUN)
            also = [
                nodes.paragraph("", "", nodes.Text("And "), link, nodes.Text("."))
            ]
        usage = nodes.literal_block("usage", f"{command.prog} ", classes=["usage"])
        for word in words:  # makes lines break between arguments, not at hyphens
            usage += [nodes.inline("", word), nodes.Text(" ")]
        return self.section(
            nodes.make_id(command.prog),
            code(command.prog),
            prose((command.description or "").replace("%%", "%")),
            usage,
            definitions(
                (code(invocation(a)), [prose(explanation(a))]) for a in own
            ),
            *also,
        )

    def section(
        self, identity: str, title: str | nodes.Node, *content: nodes.Node
    ) -> nodes.section:
        inside = nodes.Text(title) if isinstance(title, str) else title
        section = nodes.section("", nodes.title("", "", inside), ids=[identity])
        section["names"] = [nodes.fully_normalize_name(inside.astext())]
        self.state.document.note_implicit_target(section, section)
        section += content
        return section


def changes(preset: dict[str, Any]) -> nodes.paragraph:
    """The options that a preset sets, in one line."""
    words = nodes.paragraph()
    for i, (option, value) in enumerate(preset.items()):
        words += [nodes.Text(", " if i else ""), code(f"{option} = {shown(value)}")]
    return words


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", tidy_docstring)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("missing-reference", find_bare_name)
    app.add_directive("modules", Modules)
    app.add_directive("config-options", ConfigOptions)
    app.add_directive("command-line", CommandLine)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
