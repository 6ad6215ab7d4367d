"""Settings of the site; ``make docs`` builds it."""

from lora_jax.version import __version__

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
    "source_repository": "https://github.com/lora-jax/lora_jax/",
    "source_branch": "main",
    "source_directory": "docs/",
}
# A prompt is no part of a command.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Headings have the anchors that GitHub gives them, so that links work in both places.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "dollarmath", "fieldlist"]
# Files that are included from outside docs/ lead to files of the repository.
suppress_warnings = ["toc.empty_glob"]

# Pages that are notebooks are run, once for each version of their text.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

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
nitpick_ignore_regex = [("py:.*", rf"({_OTHERS})(\..*)?")]
