"""``{{ tissue }}`` in a caption: where the images of this build come from, as CC BY asks to be said."""

from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

from nucseg.data.preview import attribution


def name_source(app: Sphinx, config: Config) -> None:
    """Set MyST's substitution before the pages are read."""
    config.myst_substitutions = {
        **config.myst_substitutions,
        "tissue": attribution(),
    }


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect(
        "config-inited", name_source, priority=100
    )  # before MyST reads its settings
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
