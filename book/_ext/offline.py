"""Pages that work without a network: formulas as MathML, and no scripts from a CDN."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.locale import _
from sphinx.util.math import get_node_equation_number

# After a formula a browser may break the line, even before a full stop
CLOSING = tuple(".,;:!?)’")


def mathml(latex: str, display: str) -> str:
    """Convert LaTeX to ``<math>``. Raises ``SphinxError`` for a formula that cannot be fully converted."""
    try:
        result = convert(latex.strip(), display=display)
    except Exception as error:  # latex2mathml raises bare subclasses of Exception
        raise SphinxError(
            f"Formula {latex!r} is not understood: {type(error).__name__}."
        ) from error
    # latex2mathml silently closes open braces, and passes unknown commands through as text
    if latex.count("{") != latex.count("}"):
        raise SphinxError(f"Formula {latex!r} has braces that do not match.")
    if "\\" in result:
        raise SphinxError(f"Formula {latex!r} has an unknown command.")
    return result


def visit_inline(self: Any, node: nodes.math) -> None:
    after = node.next_node(descend=False, siblings=True)
    joined = isinstance(after, nodes.Text) and after.astext()[:1] in CLOSING
    self.body.append(
        f'<span class="math notranslate">{mathml(node.astext(), "inline")}</span>'
        + ("\N{WORD JOINER}" if joined else "")
    )
    raise nodes.SkipNode


def visit_block(self: Any, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math notranslate"))
    self.body.append(mathml(node.astext(), "block"))
    if node["number"]:
        self.body.append(
            f'<span class="eqno">({get_node_equation_number(self, node)})'
        )
        self.add_permalink_ref(node, _("Link to this equation"))
        self.body.append("</span>")
    self.body.append("</div>\n")
    raise nodes.SkipNode


def drop_thebe(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: Any
) -> None:
    """Remove the scripts of thebe, which runs cells over the network: no page here uses it."""
    for kind in ("script_files", "css_files"):
        context[kind] = [
            file
            for file in context[kind]
            if "thebe" not in f"{file} {getattr(file, 'attributes', '')}"
        ]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("html-page-context", drop_thebe, priority=900)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
