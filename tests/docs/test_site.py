"""The pages: links lead somewhere, snippets print what stands below them, messages are in the source."""

import ast
import functools
import importlib.util
import re
import urllib.parse

import pytest

import lora_jax
from tests.helpers.places import ROOT
from tests.helpers.snippets import run, snippets

DOCS = ROOT / "docs"
GITHUB = "https://github.com/lora-jax/lora_jax/blob/main/"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)
FILES = [
    *PAGES, *ROOT.glob("*.md"), ROOT / "examples/README.md", ROOT / "examples/gallery/README.md",
]  # fmt: skip
# Pages whose snippets are run one after the other, in one name space. Others have tests of their own.
RUN = ("api/sharding", "concepts", "flax_code", "getting_started", "index", "peft", "targets")
RUN_SLOWLY = ("models",)


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@functools.cache
def anchors(path):
    """The anchors that GitHub gives the headings of a file."""
    text = path.read_text(encoding="utf-8")
    if included := re.match(r"```\{include\} (\S+)\n", text):
        return anchors((path.parent / included[1]).resolve())
    headings = re.findall(r"^#+ (.*)$", without_code(text), flags=re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain]


def links(path):
    text = without_code(path.read_text(encoding="utf-8"))
    return re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "", text))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in links(path):
        target, _, anchor = link.removeprefix(GITHUB).partition("#")
        if re.match(r"\w+:", target):
            continue
        folder = ROOT if link.startswith(GITHUB) else path.parent
        file = (folder / urllib.parse.unquote(target)).resolve() if target else path
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file), link


def test_links_that_lead_nowhere_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `head`, and more\n[a](gone.md) `[b](code.md)`\n```\n[c](block.md)\n```\n")
    assert links(page) == ["gone.md"] and anchors(page) == ["a-head-and-more"]


def test_every_page_is_in_the_table_of_contents():
    listed = set()
    for page in PAGES:
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), flags=re.DOTALL):
            names = [x for x in block.splitlines() if x and not x.startswith(":")]
            listed |= {p for x in names for p in page.parent.glob(f"{x}.md")}
    assert {p for p in PAGES if p != DOCS / "index.md"} == listed


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_bytes()) < 9000


@pytest.mark.parametrize(
    "name", [*RUN, *(pytest.param(name, marks=pytest.mark.slow) for name in RUN_SLOWLY)]
)
def test_snippets_run_and_print_what_stands_below(name, tmp_path, monkeypatch, capsys):
    """A text block right below a snippet is what it prints; of a long line, the beginning."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    blocks = snippets(text)
    assert blocks
    space = {}
    for snippet, shown in blocks:
        run(snippet, space)
        printed = capsys.readouterr().out
        for line in shown.splitlines():
            assert line in printed


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_python_blocks_compile(page):
    for k, snippet in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
        compile(snippet, f"{page.name}, block {k}", "exec")


def test_the_sweep_that_is_shown_is_the_quickstarts():
    text = (DOCS / "sweeps.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```text\n(def get_config.*?)```", text, flags=re.DOTALL)
    source = (ROOT / "configs" / "quickstart_sweep.py").read_text(encoding="utf-8")
    assert all(line in source for line in shown.splitlines())


# Messages.


def literal_parts(node):
    """The parts of a string in the source; None for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else None for v in node.values]
        return parts if any(parts) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = literal_parts(node.left), literal_parts(node.right)
        return left + right if left and right else left
    return None


def beginning(parts, letters=13):
    """A regular expression for how a message begins: so many letters of its own, and what is put in."""
    expression, count = "", 0
    for part in parts:
        expression += ".+?" if part is None else re.escape(part[: letters - count])
        count += len(part or "")
        if count >= letters:
            return re.compile(expression, flags=re.DOTALL)
    return None


@functools.cache
def message_beginnings():
    found = set()
    for folder in ("lora_jax", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = literal_parts(node)
                if parts and (expression := beginning(parts)):
                    found.add(expression)
    return found


@functools.cache
def quoted_messages():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return [block.strip() for block in re.findall(r"```output\n(.*?)```", text, flags=re.DOTALL)]


@pytest.mark.parametrize("message", quoted_messages(), ids=lambda m: m[:40])
def test_messages_of_the_page_are_in_the_source(message):
    assert any(expression.match(message) for expression in message_beginnings()), message


def test_a_message_of_nowhere_is_seen():
    assert not any(x.match("the flux has no capacitor today") for x in message_beginnings())
    assert len(quoted_messages()) > 35


# The API.


def test_every_public_name_is_in_the_reference():
    text = "".join(p.read_text(encoding="utf-8") for p in (DOCS / "api").glob("*.md"))
    directives = set(re.findall(r"^\.\. auto(?:class|function):: ([\w.]+)$", text, re.MULTILINE))
    modules = set(re.findall(r"^\.\. automodule:: ([\w.]+)$", text, re.MULTILINE))
    for name in set(lora_jax.__all__) - {"__version__"}:
        assert name in directives or f"lora_jax.{name}" in modules, name


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {lora_jax.__version__}\n" in text
    assert f"{{{lora_jax.__version__}}}" in (DOCS / "citation.md").read_text(encoding="utf-8")


# Links of files that are included.


@pytest.fixture(scope="module")
def settings():
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_are_translated(settings):
    readme, page = ROOT / "README.md", DOCS / "page.md"
    translate = settings.translate_links
    assert translate("[a](docs/sweeps.md#x)", readme) == "[a](/sweeps.md#x)"
    assert translate("[a](CONTRIBUTING.md)", readme) == "[a](/contributing.md)"
    assert translate("[a](https://example.org)", readme) == "[a](https://example.org)"
    blob = f"{settings.REPOSITORY}/blob/main/configs/common.py"
    assert translate("[a](../configs/common.py)", page) == f"[a]({blob})"
