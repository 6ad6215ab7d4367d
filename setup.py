"""Makes the links of the README absolute for PyPI; everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "lora-jax/lora_jax"


def make_absolute(markdown: str) -> str:
    """Makes links to files of the repository, and pictures in it, links to GitHub."""
    picture, link = r"(!\[[^\]]*\])\((?!\w+:|#)", r"\]\((?!\w+:|#)"
    markdown = re.sub(
        picture, rf"\1(https://raw.githubusercontent.com/{REPOSITORY}/main/", markdown
    )
    return re.sub(link, f"](https://github.com/{REPOSITORY}/blob/main/", markdown)


if __name__ == "__main__":
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(long_description=make_absolute(readme), long_description_content_type="text/markdown")
