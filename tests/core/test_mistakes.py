"""What a user sees: how nodes and explanations print, and what a wrong argument is told."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lora_jax as lora
from lora_jax import paths

X = jnp.ones((2, 6))
CONFIG = lora.LoRAConfig(rank=2)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        for k in range(3):
            x = nn.Dense(6, name=f"layer_{k}")(x)
        return x


@pytest.fixture(scope="module")
def stack():
    model = Stack()
    params = model.init(jax.random.key(0), X)
    return model, params, lora.init(jax.random.key(1), model.apply, params, CONFIG, X)


def test_a_node_prints_dtypes_and_shapes(stack):
    _, params, adapter = stack
    node = adapter["params"]["layer_0"]["kernel"]
    assert repr(node) == "LowRank(a=f32[6,2], b=f32[2,6], scale=8.0, axes='io')"
    bound = lora.bind(params, adapter)["params"]["layer_0"]["kernel"]
    assert repr(bound) == (
        "LowRank(a=f32[6,2], b=f32[2,6], scale=8.0, w=f32[6,6], axes='io', "
        "name='params/layer_0/kernel')"
    )
    mask = lora.mask(adapter)["params"]["layer_0"]["kernel"]
    assert repr(mask) == "LowRank(a=True, b=True, scale=8.0, axes='io')"


def test_an_explanation_prints_by_itself_with_layers_folded(stack):
    model, params, adapter = stack
    explanation = lora.explain(model.apply, params, adapter, X)
    expected = "3 adapted kernels\nparams/layer_*/kernel (3 times): factored 1, formed 0"
    assert repr(explanation) == str(explanation) == expected
    assert isinstance(explanation, lora.Explanation) and len(explanation.kernels) == 3


def test_layers_that_differ_are_rows_of_their_own():
    fn = lambda p, x: (x @ p["layer_0"], x @ (p["layer_1"] ** 2))
    params = {"layer_0": jnp.eye(6), "layer_1": jnp.eye(6)}
    config = lora.LoRAConfig(rank=1, targets=tuple(params), roles={"layer_1": "io"})
    adapter = lora.init(jax.random.key(0), fn, params, config, X)
    first, second = str(lora.explain(fn, params, adapter, X)).splitlines()[1:3]
    assert first == "layer_0: factored 1, formed 0" and second.startswith("layer_1: factored 0")


def test_what_is_listed_is_what_is_promised():
    assert dir(lora) == sorted(lora.__all__)
    assert {"LowRank", "Explanation", "init", "lift"} <= {*dir(lora)}
    assert all(hasattr(lora, name) for name in lora.__all__)


@pytest.mark.parametrize("pattern", ["params/layer_*/kernel", "layer_*", "lay*_1", "*/kernel"])
def test_a_pattern_that_a_message_prints_can_be_typed_back(stack, pattern):
    model, params, _ = stack
    config = lora.LoRAConfig(rank=2, targets=[pattern])
    adapter = lora.init(jax.random.key(0), model.apply, params, config, X)
    names = [n for n in paths.named_leaves(params) if n.endswith("kernel")]
    wanted = names if pattern != "lay*_1" else ["params/layer_1/kernel"]
    assert [f"params/{k}/kernel" for k in adapter["params"]] == wanted


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("layer_*/kernel", "layer_1/kernel", True),
        ("layer_*/kernel", "layer_1/mlp/kernel", False),  # a star is within a component
        ("layer_*", "my_layer_1/kernel", False),
        ("*", "kernel", True),
        ("a.*", "a.b/kernel", True),
        ("a.*", "ab/kernel", False),  # a dot is a dot
    ],
)
def test_stars(pattern, name, fits):
    assert paths.matches(pattern, name) is fits


@pytest.mark.parametrize(
    "use",
    [lambda w: X @ w, lambda w: w @ X.T, jnp.sum, lambda w: X + w, jnp.asarray],
)
def test_a_bound_tree_without_lift(stack, use):
    _, params, adapter = stack
    bound = lora.bind(params, adapter)["params"]["layer_0"]["kernel"]
    with pytest.raises(TypeError, match=r"'params/layer_0/kernel'.* Call lift\(fn\)\(bound, ...\)"):
        use(bound)
    with pytest.raises(TypeError, match=r"bind\(params, adapter\) puts it"):
        use(adapter["params"]["layer_0"]["kernel"])


def test_a_leaf_that_is_trained_in_full_has_no_name_of_its_own():
    bound = lora.bind({"b": jnp.ones(2)}, {"b": jnp.zeros(2)})["b"]
    with pytest.raises(TypeError, match=r"^A leaf of the parameters is bound"):
        jnp.sum(bound)


def init(fn, config, params=None):
    return lora.init(jax.random.key(0), fn, params or {"w": jnp.eye(6)}, config, X)


plain = lambda p, x: x @ p["w"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init(plain, {"rank": 2}), r"got dict \{'rank': 2\}: LoRAConfig\(\*\*config\)"),
        (lambda: init(plain, None), r"A LoRAConfig is wanted, got NoneType None\."),
        (lambda: init(Stack(), CONFIG), r"Stack is a module: give module\.apply"),
        (lambda: lora.tabulate(Stack(), {"w": X}, CONFIG, X), r"Stack is a module"),
        (lambda: lora.lift(Stack()), r"Stack is a module: give module\.apply"),
        (lambda: lora.lift(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), r"Linear is a module.*from_nnx"),
        (lambda: lora.lift({"w": 1}), r"A function fn\(params, ...\) is wanted, got dict"),
        (lambda: lora.lift(None), r"is wanted, got NoneType None\."),
        (lambda: init(jax.random.key(1), CONFIG), r"A function .* is wanted, got"),
    ],
)
def test_arguments_of_a_wrong_kind(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_what_is_callable_and_no_module_is_a_function():
    class Wrapper:
        def __call__(self, params, x):
            return plain(params, x)

    for fn in (Wrapper(), jax.jit(plain), nnx.jit(plain)):
        assert lora.lift(fn, strict=True)({"w": jnp.eye(6)}, X).shape == (2, 6)


def test_an_explanation_is_a_table_in_a_notebook(stack):
    model, params, adapter = stack
    page = lora.explain(model.apply, params, adapter, X)._repr_html_()
    assert page.count("<tr>") == 2 and "params/layer_*/kernel</td>" in page
    squared = lambda p, x: x @ (p["<w>"] ** 2)
    params = {"<w>": jnp.eye(6)}
    config = lora.LoRAConfig(rank=1, targets=["<w>"], roles={"<w>": "io"})
    adapter = lora.init(jax.random.key(0), squared, params, config, X)
    page = lora.explain(squared, params, adapter, X)._repr_html_()
    assert "&lt;w&gt;" in page and "<w>" not in page and "integer_pow" in page


def test_a_table_of_leaves_prints_by_itself(stack):
    model, params, _ = stack
    table = lora.tabulate(model.apply, params, CONFIG, X)
    assert repr(table) == str(table) and repr(table).startswith("leaf")
    kernels = "params/layer_*/kernel (3 times) 6×6   kernel io   adapted 2"
    assert [line.rstrip() for line in str(table).splitlines()][2:] == [kernels]
    page = table._repr_html_()
    assert page.count("<tr>") == 3 and "params/layer_*/kernel (3 times)</td>" in page


def test_layers_of_which_one_is_left_out_are_two_rows(stack):
    model, params, _ = stack
    config = lora.LoRAConfig(rank=2, targets=("layer_1/kernel",))
    lines = str(lora.tabulate(model.apply, params, config, X)).splitlines()[1:]
    assert [" ".join(line.split()) for line in lines if "bias" not in line] == [
        "params/layer_*/kernel (2 times) 6×6 kernel io frozen not among the targets",
        "params/layer_1/kernel 6×6 kernel io adapted 2",
    ]


@pytest.mark.parametrize(
    ("scheme", "shown"),
    [
        (
            "nf4",
            "CodeBook(codes=u8[32,8], scales=f32[1,8], axes='io', sizes=(64, 8), dtype='float32', "
            "table='nf4', block=64)",
        ),
        (
            "int8",
            "Affine(codes=i8[64,8], scales=f32[1,8], axes='io', sizes=(64, 8), dtype='float32', "
            "tile=(64, 1), code='int8', factor=0.007874015718698502)",
        ),
    ],
)
def test_a_quantized_kernel_prints_no_numbers(scheme, shown):
    quantized = lora.quantize({"w": jnp.ones((64, 8))}, scheme, like={"w": "io"})
    assert repr(quantized["w"]) == shown
    node = lora.LowRank(jnp.ones((64, 2)), jnp.ones((2, 8)), 1.0)
    assert f" w={shown}, axes='io'" in repr(lora.bind(quantized, {"w": node})["w"])


@pytest.mark.filterwarnings("ignore:The chararray class is deprecated:DeprecationWarning")
def test_treescope_shows_nodes_and_trees(stack):
    treescope = pytest.importorskip("treescope")
    _, _, adapter = stack
    text = treescope.render_to_text(adapter)
    assert text.count("LowRank(") == 3 and "scale=8.0" in text and "float32(6, 2)" in text


@pytest.mark.parametrize("use", [lora.bind, lora.merge, lora.summary])
def test_the_parameters_and_the_adapter_exchanged(stack, use):
    _, params, adapter = stack
    with pytest.raises(ValueError, match=r"Got an adapter where .* the parameters come first"):
        use(adapter, params)


def test_parameters_a_level_above_or_below_those_of_the_adapter(stack):
    _, params, adapter = stack
    with pytest.raises(ValueError, match=r"without 'params': pass \{'params': params\}"):
        lora.bind(params["params"], adapter)
    with pytest.raises(ValueError, match=r"below 'params': pass params\['params'\]"):
        lora.merge(params, adapter["params"])
    with pytest.raises(ValueError, match=r"parameters here: params/encoder/kernel\.$"):
        lora.bind({"params": {"encoder": {"kernel": jnp.eye(6)}}}, adapter)


def test_more_arguments_of_a_wrong_kind(stack):
    model, params, adapter = stack
    with pytest.raises(TypeError, match=r"got int 3: jax.random.key\(3\) makes one"):
        lora.init(3, model.apply, params, CONFIG, X)
    with pytest.raises(TypeError, match="Stack is a module: give module.apply"):
        lora.explain(model, params, adapter, X)
    with pytest.raises(TypeError, match=r"Stack is a Linen module.* give module.apply"):
        lora.from_nnx(model)


@pytest.mark.parametrize("targets", [["layer_0"], ("layer_0",), "layer_0", {"layer_0": 1}.keys()])
def test_targets_of_any_kind_are_the_same(targets):
    config = lora.LoRAConfig(rank=2, targets=targets)
    assert config == lora.LoRAConfig(rank=2, targets=("layer_0",)) and hash(config)
