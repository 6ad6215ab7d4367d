"""The examples: each learns, merges to what it computes lifted, and keeps all kernels factored."""

import importlib
import importlib.util

import jax
import pytest

from tests.helpers.places import ROOT

FOLDER = ROOT / "examples"
EXAMPLES = {  # file: library that it needs, kernels adapted, their uses
    "nnx_transformer": ("flax", 7, 7),
    "vit": ("flax", 13, 13),
    "keras_classifier": ("keras", 4, 4),
    "equinox_mlp": ("equinox", 2, 2),
    "hf_flax_gpt2": ("transformers", 9, 10),
}


def _check(name):
    library, kernels, uses = EXAMPLES[name]
    # Not imported here: the example sets Keras's backend first.
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed (extra `examples`)")
    result = importlib.import_module(f"examples.{name}").main()
    assert result.losses[-1] < 0.75 * result.losses[0]
    assert result.difference < 1e-4
    found = result.explanation.kernels.values()
    assert len(found) == kernels
    assert sum(use.factored for use in found) == uses
    assert not any(use.fallbacks for use in found)


# Libraries of others may promote ranks.
@pytest.mark.parametrize("name", [x for x in EXAMPLES if not x.startswith("hf_")])
@pytest.mark.slow
def test_example(name):
    with jax.numpy_rank_promotion("allow"):
        _check(name)


@pytest.mark.hf_flax
@pytest.mark.filterwarnings("ignore")
def test_example_of_flax_gpt2():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "FlaxGPT2LMHeadModel"):
        pytest.skip("this transformers has no Flax models; 4.56.2 is the last that has")
    with jax.numpy_rank_promotion("allow"):
        _check("hf_flax_gpt2")


def test_each_is_short_and_in_the_table():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in FOLDER.glob("*.py"):
        if path.stem in EXAMPLES:
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path.name
            assert f"`{path.name}`" in table
    assert {path.stem for path in FOLDER.glob("*.py")} == {*EXAMPLES, "common", "__init__"}
