"""The library keeps to its plan: what may import what, and how large anything is."""

import ast
import re
import statistics
import subprocess
import sys

import pytest

from tests.helpers.places import ROOT

# Each room imports those above it. The root and the transform are one: the algebra of arrays stands
# in the root, and what the root says of adapters goes through the transform.
ROOMS = ("core", "peft", "models", "data", "training", "tasks", "sweeps", "experiments")
FILES = {
    path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
    for folder in ("lora_jax", "experiments", "configs")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
LIBRARY = [path for path in FILES if path.parts[0] == "lora_jax"]


def module(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def imports(path):
    """The modules of the project that a file imports, anywhere in it."""
    for node in ast.walk(FILES[path]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in whole]
        else:
            continue
        yield from (name for name in names if name in MODULES and name != module(path))


def room(name):
    first, *rest = name.split(".")
    if first == "lora_jax":
        return rest[0] if rest and rest[0] in ROOMS else "core"
    return "experiments"


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_a_room_imports_what_stands_above_it(path):
    if path.name == "__init__.py" and len(path.parts) == 2:
        return  # `import lora_jax` has PEFT's functions in it
    here = ROOMS.index(room(module(path)))
    below = [name for name in imports(path) if ROOMS.index(room(name)) > here]
    assert not below


def test_there_is_no_circle():
    """A module can be imported before those that import it: so it can be understood before them."""
    graph = {module(path): set(imports(path)) for path in FILES}
    graph.pop("lora_jax")  # the package, which every import of a part of it imports
    while ready := [name for name, wanted in graph.items() if not wanted & graph.keys()]:
        for name in ready:
            graph.pop(name)
    assert not graph, f"these import each other: {sorted(graph)}"


def functions(path):
    return [node for node in ast.walk(FILES[path]) if isinstance(node, ast.FunctionDef)]


def size(function):
    """Lines of a function without its docstring."""
    start = function.body[0]
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    return lines - (start.end_lineno - start.lineno + 1)


def test_modules_and_functions_are_small():
    assert statistics.median(size(f) for path in LIBRARY for f in functions(path)) <= 10
    lines = {path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in LIBRARY}
    assert not {path: n for path, n in lines.items() if n > 400}


def test_functions_have_few_parameters():
    def count(arguments):
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        return len([name for name in names if name not in ("self", "cls")])

    many = [(path, f.name) for path in LIBRARY for f in functions(path) if count(f.args) > 7]
    assert not many


def test_a_library_changes_nothing_of_its_process():
    """No flags, no choice of a window system, nothing printed: that is for programs."""
    found = []
    for path in LIBRARY:
        for node in ast.walk(FILES[path]):
            text = ast.unparse(node) if isinstance(node, ast.Call | ast.Attribute) else ""
            if isinstance(node, ast.Call) and text.startswith(("print(", "matplotlib.use(")):
                found.append((path, node.lineno, text))
            if text == "sys.stdout" or text.startswith("plt."):
                found.append((path, node.lineno, text))
        assert not {"absl.flags", "absl"} & set(_all_imports(path)), path
    assert not found


def _all_imports(path):
    for node in ast.walk(FILES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


@pytest.mark.parametrize(
    "name, heavy",
    [
        ("lora_jax.sweeps.trials", "matplotlib tensorboardX orbax tensorflow_datasets scipy"),
        ("lora_jax.training.step", "matplotlib tensorboardX orbax tensorflow_datasets scipy"),
        ("lora_jax.data.batches", "matplotlib tensorboardX tensorflow_datasets ml_collections"),
        ("lora_jax.models.gpt2", "optax matplotlib tensorflow_datasets ml_collections"),
    ],
)
def test_a_module_imports_what_it_needs(name, heavy):
    code = f"import sys, {name}; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_tests_share_what_stands_in_helpers_alone(path):
    """No test imports another, and whatever a room's folder holds beside tests is a conftest."""
    shared = ("helpers", "typing")  # what type checkers read is no test
    assert path.parent.name in shared or path.stem.startswith(("test_", "conftest", "__init__"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tests":
            assert node.module.startswith("tests.helpers"), f"{path}:{node.lineno}"
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        assert not [n for n in names if n.split(".")[0] == "tests" or n.startswith("test_")]


def test_the_readme_of_the_tests_names_every_helper():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    helpers = {p.stem for p in (ROOT / "tests" / "helpers").glob("*.py")} - {"__init__"}
    assert helpers == set(re.findall(r"`(\w+)`", text)) & helpers


class _Uses(ast.NodeVisitor):
    """Names that are used when a module runs: those of annotations are not."""

    def __init__(self):
        self.names = set()

    def visit_FunctionDef(self, node):
        values = [*node.decorator_list, *node.args.defaults, *node.args.kw_defaults, *node.body]
        for value in filter(None, values):
            self.visit(value)

    def visit_AnnAssign(self, node):
        if node.value:
            self.visit(node.value)

    def visit_Name(self, node):
        self.names.add(node.id)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda p: p.stem)
def test_what_programs_import_for_type_checkers_is_not_used(path):
    tree, uses = ast.parse(path.read_text()), _Uses()
    blocks = [
        x for x in tree.body if isinstance(x, ast.If) and ast.unparse(x.test) == "TYPE_CHECKING"
    ]
    names = {
        alias.asname or alias.name
        for block in blocks
        for x in block.body
        for alias in x.names
    }  # fmt: skip
    uses.visit(tree)
    assert not names & uses.names
