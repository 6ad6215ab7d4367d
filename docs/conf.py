"""Settings of the site; ``make docs`` builds it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from lora_jax.version import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/lora-jax/lora_jax"
# Files of the repository that are pages of the site.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "citation.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
}

project = "lora_jax"
author = "The lora_jax authors"
copyright = "The lora_jax authors, Apache-2.0"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"lora_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": f"{REPOSITORY}/",
    "source_branch": "main",
    "source_directory": "docs/",
}
# A prompt is no part of a command.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Headings have the anchors that GitHub gives them, so that links work in both places.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "dollarmath", "fieldlist"]

# Pages that are notebooks are run, once for each version of their text.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars

jax.Array.__qualname__ = jax.Array.__name__ = "Array"  # by which people know it
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# References are checked within the project. Other projects' inventories are not fetched: the site
# is built without a network.
nitpicky = True
_OTHERS = "jax|jaxlib|numpy|np|optax|flax|nnx|nn|collections|pathlib|typing|abc|argparse|tokenizers"
nitpick_ignore_regex = [
    ("py:.*", rf"({_OTHERS})(\..*)?"),
    # What nobody makes by hand.
    ("py:.*", r"lora_jax\.(data\.chat_template|models\.(attention|layers|token_ids))\..*"),
    ("py:mod", r"lora_jax\.quantized(_sharding)?"),
    # Type variables: the signature of a function, its result, and a tree.
    ("py:class", r"~?P|lora_jax\.transform\.lift\.[PR]|lora_jax\.adapter\.Tree"),
]


def translate_links(text: str, source: Path) -> str:
    """Turns links that GitHub understands into links of the site.

    A link from a file of the repository leads to another: to one that is a page, or to one that is
    not, which the site shows on GitHub.

    Args:
      text: Markdown.
      source: the file that it is from.
    """

    def translate(match: re.Match) -> str:
        target, anchor = match[2], match[3] or ""
        path = (source.parent / target).resolve()
        if ":" in target or not path.is_relative_to(ROOT) or not path.exists():
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        page = PAGES.get(name, name.removeprefix("docs/"))
        if name in PAGES or name.startswith("docs/"):
            return f"{match[1]}(/{page}{anchor})"
        kind = "tree" if path.is_dir() else "blob"
        return f"{match[1]}({REPOSITORY}/{kind}/main/{name}{anchor})"

    return re.sub(r"(\])\(([^()#\s]+)(#[^()\s]*)?\)", translate, text)


def _read_page(app: Sphinx, name: str, content: list[str]) -> None:
    content[0] = translate_links(content[0], Path(app.env.doc2path(name)))


def _read_included(app: Sphinx, path: Path, name: str, content: list[str]) -> None:
    content[0] = translate_links(content[0], (Path(app.srcdir) / path).resolve())


def setup(app: Sphinx) -> None:
    """Connects the translation of links, and calls a dataclass's fields by their name."""
    from sphinx.domains.python import PyObject  # here, so that tests need no Sphinx

    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Fields"
    app.connect("source-read", _read_page)
    app.connect("include-read", _read_included)
