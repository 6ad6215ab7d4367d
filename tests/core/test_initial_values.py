"""The first values of factors, against numpy's decompositions, and the node that takes them off again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import fields, sharding
from lora_jax.config import LoRAConfig
from lora_jax.lowrank import LowRank
from lora_jax.methods import METHODS
from lora_jax.methods.initial_values import INITS, PLAIN
from lora_jax.methods.offset import Offset, to_plain
from lora_jax.methods.start import Start
from lora_jax.sweeps import vmapped_step
from lora_jax.training.state import TrainState
from tests.helpers import zoo
from tests.helpers.comparisons import assert_close, perturbed

DRAWN = ("uniform", "gaussian", "orthogonal")
OF_THE_KERNEL = ("pissa", "pissa_niter_4", "pissa_niter_16", "olora", "milora")
is_offset = lambda x: isinstance(x, Offset)


@pytest.fixture(autouse=True)
def numbers():
    """The same numbers for a test whatever ran before it: how exact singular vectors are depends on them."""
    global RNG
    RNG = np.random.default_rng(0)


def start(kernel, axes="io", *, init, rank=3, scale=2.0, key=0):
    return Start(
        key=jax.random.key(key), name="layer/kernel", kernel=kernel, axes=axes, rank=rank,
        scale=scale, dtype=jnp.dtype(jnp.float32), dropout=0.0, init=init,
    )  # fmt: skip


def make(kernel, axes="io", **fields):
    made = start(kernel, axes, **fields)
    return METHODS["lora"](made)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def as_matrices(x, axes):
    """``(n, in, out)``, by an einsum of numpy's."""
    order = [k for role in "bio" for k, r in enumerate(axes) if r == role]
    size = lambda role: int(np.prod([n for n, r in zip(x.shape, axes, strict=True) if r == role]))
    return np.transpose(np.asarray(x, np.float64), order).reshape(-1, size("i"), size("o"))


def product(node):
    """``s·a₀·b₀`` as matrices."""
    rank, n = node.a0.shape[-1], node.axes.count("b")
    count = int(np.prod(node.a0.shape[:n]))
    a, b = np.asarray(node.a0, np.float64), np.asarray(node.b0, np.float64)
    return node.scale * a.reshape(count, -1, rank) @ b.reshape(count, rank, -1)


# ---- Values --------------------------------------------------------------------------------------

# Float32 decompositions of matrices with entries of order one.
EXACT = dict(rtol=2e-5, atol=2e-5)
KERNELS = [("io", (7, 5)), ("oi", (5, 7)), ("bioo", (2, 6, 2, 3)), ("iiio", (3, 3, 2, 5)), ("iobi", (3, 4, 2, 2))]  # fmt: skip


def principal(w, rank, part):
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    return (u[:, part(rank)] * s[part(rank)]) @ vh[part(rank)], s[part(rank)]


@pytest.mark.parametrize(("axes", "shape"), KERNELS)
@pytest.mark.parametrize("init", ["pissa", "milora"])
def test_singular_parts_for_any_axes(init, axes, shape):
    kernel = normal(*shape)
    node = make(kernel, axes, init=init)
    part = {"pissa": lambda r: slice(r), "milora": lambda r: slice(-r, None)}[init]
    for w, got, a, b in zip(as_matrices(kernel, axes), product(node), *sides(node), strict=True):
        want, s = principal(w, 3, part)
        assert_close(got, want, **EXACT)
        # The roots of the singular values are in either factor.
        assert_close(a.T @ a, np.diag(s / 2.0), **EXACT)
        assert_close(b @ b.T, np.diag(s / 2.0), **EXACT)


def sides(node):
    rank = node.a.shape[-1]
    a, b = np.asarray(node.a, np.float64), np.asarray(node.b, np.float64)
    n = product(node).shape[0]
    return a.reshape(n, -1, rank), b.reshape(n, rank, -1)


@pytest.mark.parametrize("scale", [0.25, 2.0])
@pytest.mark.parametrize(("axes", "shape"), KERNELS)
def test_olora_is_a_qr_whose_scale_is_not_divided_out(axes, shape, scale):
    kernel = normal(*shape)
    node = make(kernel, axes, init="olora", scale=scale)
    for w, got, b in zip(as_matrices(kernel, axes), product(node), sides(node)[1], strict=True):
        q, r = np.linalg.qr(w.T)
        assert_close(got, scale * (q[:, :3] @ r[:3]).T, **EXACT)
        assert_close(b @ b.T, np.eye(3), **EXACT)
        # The projection of the outputs onto the span of the first inputs' weights.
        first = w[:3].T
        assert_close(got, scale * (first @ np.linalg.pinv(first) @ w.T).T, **EXACT)


def test_randomized_svd_comes_near_the_exact_one():
    u, v = np.linalg.qr(RNG.normal(size=(60, 40)))[0], np.linalg.qr(RNG.normal(size=(40, 40)))[0]
    kernel = jnp.asarray((u * 0.9 ** np.arange(40)) @ v, jnp.float32)
    want, _ = principal(np.asarray(kernel, np.float64), 3, slice)
    errors = []
    for init in ("pissa_niter_4", "pissa_niter_16"):
        node = make(kernel, init=init)
        errors.append(np.linalg.norm(product(node)[0] - want))
        again = make(kernel, init=init)
        np.testing.assert_array_equal(node.a, again.a)  # the key alone decides
        assert not np.array_equal(node.a, make(kernel, init=init, key=1).a)
    assert errors[0] < 0.02 and errors[1] < 1e-4


def test_randomized_svd_of_a_small_kernel():
    kernel = normal(5, 4)  # fewer sides than columns that it would draw
    want, _ = principal(np.asarray(kernel, np.float64), 3, slice)
    assert_close(product(make(kernel, init="pissa_niter_4"))[0], want, **EXACT)


def test_gaussian_has_a_standard_deviation_of_one_over_the_rank():
    node = make(normal(400, 50), init="gaussian", rank=4)
    assert abs(np.std(node.a) - 1 / 4) < 0.01 and not np.any(node.b)


def test_orthogonal_factors_have_a_product_of_exactly_zero():
    node = make(normal(2, 200, 50), "bio", init="orthogonal", rank=4)
    assert isinstance(node, LowRank) and np.any(node.a) and np.any(node.b)
    assert not np.any(node.merge(jnp.zeros((2, 200, 50))))
    ranks = [np.linalg.matrix_rank(np.asarray(x)) for x in (node.a[0], node.b[0])]
    assert ranks == [2, 2]
    assert abs(np.std(node.a[..., :2]) - 0.1) < 0.01


def test_orthogonal_refuses_an_odd_rank():
    with pytest.raises(ValueError, match="halves the rank, and that of 'layer/kernel' is 3"):
        make(normal(6, 6), init="orthogonal")


@pytest.mark.parametrize("init", OF_THE_KERNEL)
def test_a_shape_alone_is_refused(init):
    shape = jax.ShapeDtypeStruct((6, 5), jnp.float32)
    with pytest.raises(ValueError, match=f"init='{init}' needs the numbers of 'layer/kernel'"):
        make(shape, init=init)
    assert not np.any(make(shape, init="gaussian").b)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantized_kernel_is_decoded_one_matrix_at_a_time(scheme, monkeypatch):
    kernel = lora.quantize({"w": normal(3, 64, 64)}, scheme, like={"w": "bio"})["w"]
    want = make(lora.merge({"w": kernel}, {})["w"], "bio", init="pissa")
    shapes = []
    plain = type(kernel).matrix
    record = lambda self: shapes.append(self.shape) or plain(self)
    monkeypatch.setattr(type(kernel), "matrix", record)
    got = make(kernel, "bio", init="pissa")
    assert shapes == [(64, 64)] * 3
    assert_close(product(got), product(want), **EXACT)


def test_an_init_that_needs_data_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="from gradients: .*lora.init_from_gradients"):
        make(normal(6, 5), init="lora_ga")
    with pytest.raises(ValueError, match="from activations: .*lora.init_from_activations"):
        make(normal(6, 5), init="eva")


@pytest.mark.slow
def test_those_of_plain_lora_are_listed():
    """By it a sweep knows which runs share a program."""
    kernel = normal(6, 6)
    of_kernel = [n for n in INITS if n not in ("lora_ga", "eva", "loftq")]
    plain = {n for n in of_kernel if type(make(kernel, init=n, rank=2)) is LowRank}
    assert plain | {"eva", "loftq"} == set(PLAIN)


def test_an_unknown_init_is_refused_by_name():
    with pytest.raises(ValueError, match="init must be one of uniform, .*pissa.*; got 'corda'"):
        LoRAConfig(init="corda")


# ---- The node ------------------------------------------------------------------------------------


def test_an_offset_is_what_its_formula_says():
    a, a0, b, b0, w = normal(7, 2), normal(7, 2), normal(2, 5), normal(2, 5), normal(7, 5)
    node = Offset(a, b, a0, b0, 1.5)
    want = w + 1.5 * (np.float64(a) @ np.float64(b) - np.float64(a0) @ np.float64(b0))
    assert_close(node.merge(w), want, rtol=1e-5, atol=1e-5)
    loss = lambda node: jnp.sum(jnp.sin(node.merge(w)))
    g = np.cos(want)
    got = jax.grad(loss)(node)
    assert_close((got.a, got.b), (1.5 * g @ np.float64(b).T, 1.5 * np.float64(a).T @ g), rtol=1e-4, atol=1e-4)  # fmt: skip
    assert not np.any(got.a0) and not np.any(got.b0)
    plain = to_plain(node)
    assert_close(plain.merge(w), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_starts_as_the_base_bit_for_bit(init, dtype):
    params = {"w": normal(9, 8).astype(dtype)}
    x = normal(4, 9).astype(dtype)
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    config = LoRAConfig(rank=4, alpha=3.0, init=init)
    adapter = lora.init(jax.random.key(0), fn, params, config, x)
    lifted = lambda p, a, x: lora.lift(fn, strict=True)(lora.bind(p, a), x)
    merged = lambda p, a, x: fn(lora.merge(p, a), x)
    for run in (lifted, merged):
        np.testing.assert_array_equal(run(params, adapter, x), fn(params, x))
        np.testing.assert_array_equal(jax.jit(run)(params, adapter, x), jax.jit(fn)(params, x))


@pytest.mark.slow
@pytest.mark.parametrize("init", [n for n in INITS if n not in ("lora_ga", "eva", "loftq")])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_model_starts_as_itself(name, init):
    model = zoo.ZOO[name]()
    config = LoRAConfig(rank=2, targets=model.targets, init=init)
    adapter = lora.init(jax.random.key(0), model.fn, model.params, config, model.x)
    lifted = lambda p, a, x: lora.lift(model.fn, strict=True)(lora.bind(p, a), x)
    want = jax.jit(model.fn)(model.params, model.x)
    np.testing.assert_array_equal(jax.jit(lifted)(model.params, adapter, model.x), want)


def test_the_donated_and_the_frozen_arrays_are_others():
    node = make(normal(7, 5), init="pissa")
    assert node.a is not node.a0
    assert node.a.unsafe_buffer_pointer() != node.a0.unsafe_buffer_pointer()


def test_labels_counts_and_specs():
    node = make(normal(3, 7, 5), "bio", init="pissa", rank=2)
    adapter, params = {"w": node}, {"w": normal(3, 7, 5)}
    mask = lora.mask(adapter)["w"]
    assert (mask.a, mask.b, mask.a0, mask.b0) == (True, True, False, False)
    assert fields.count(node) == (3 * 2 * 12, 2 * 3 * 2 * 12)
    assert lora.summary(params, adapter).startswith("trainable params: 72 || all params: 249 ||")
    made = sharding.adapter_specs({"w": P(None, "fsdp", "tensor")}, adapter)["w"]
    assert tuple(made.a0) == tuple(made.a) == (None, "fsdp", None)
    assert tuple(made.b0) == tuple(made.b) == (None, None, "tensor")


def test_ranks_are_padded_for_a_sweep():
    w = normal(8, 6)

    def member(rank):
        adapter = adapters.as_data({"w": make(w, init="pissa", rank=rank)})
        state = TrainState(np.array(0), perturbed(adapter), (), None)
        made = vmapped_step.Member(state, np.array(True), (), np.array(0.0), {})
        return jax.tree.map(np.asarray, made)

    members = [member(1), member(3)]
    shapes = vmapped_step.common_shapes(members)
    padded = vmapped_step.pad(members[0], shapes)
    node = padded.state.adapter["w"]
    assert node.a0.shape == (8, 3) and node.b0.shape == (3, 6)
    assert_close(node.merge(w), members[0].state.adapter["w"].merge(w))
    grads = jax.grad(lambda n: jnp.sum(n.merge(w) ** 2))(jax.tree.map(jnp.asarray, node))
    assert not np.any(grads.a[:, 1:]) and not np.any(grads.b[1:])  # padding stays zero


def test_saved_and_loaded_exactly(tmp_path):
    model = zoo.ZOO["mlp"]()
    config = LoRAConfig(rank=2, alpha=3.0, targets=model.targets, init="pissa")
    adapter = perturbed(lora.init(jax.random.key(0), model.fn, model.params, config, model.x))
    lora.save(tmp_path, adapter, config)
    loaded, again = lora.load(tmp_path, model.params)
    assert again == config and again.init == "pissa"
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    assert any(map(is_offset, jax.tree.leaves(loaded, is_leaf=is_offset)))


@pytest.mark.slow
def test_every_use_is_factored_with_dropout_on_both_terms():
    model = zoo.ZOO["mlp"]()
    config = LoRAConfig(rank=2, targets=model.targets, init="olora", dropout=0.5)
    adapter = lora.init(jax.random.key(0), model.fn, model.params, config, model.x)
    report = lora.explain(model.fn, model.params, adapter, model.x)
    assert all(use.factored and not use.fallbacks for use in report.kernels.values())
    # At the start both terms are no change, so that dropout is none either.
    run = lora.lift(model.fn, dropout_key=jax.random.key(1))
    got = run(lora.bind(model.params, adapter), model.x)
    np.testing.assert_array_equal(got, model.fn(model.params, model.x))
    moved = lora.bind(model.params, perturbed(adapter))
    assert not np.allclose(run(moved, model.x), lora.lift(model.fn, dropout=0.0)(moved, model.x))


def test_an_alpha_that_differs_makes_no_difference_to_the_part_that_pissa_trains():
    w = normal(8, 6)
    one, two = make(w, init="pissa", scale=0.5), make(w, init="pissa", scale=4.0)
    assert_close(product(one), product(two), **EXACT)
    assert dataclasses.replace(one, scale=4.0).scale == two.scale


# ---- What PEFT gets wrong ------------------------------------------------------------------------


def test_tables_and_convolutions_are_not_passed_over():
    """PEFT takes its default for an embedding, in silence, and has an error for a convolution."""
    params = {"table": normal(9, 6), "conv": normal(3, 6, 5)}

    def fn(p, ids):
        dims = jax.lax.conv_dimension_numbers((1, 4, 6), (3, 6, 5), ("NWC", "WIO", "NWC"))
        x = p["table"][ids]
        return jax.lax.conv_general_dilated(x, p["conv"], (1,), "SAME", dimension_numbers=dims)

    ids = jnp.array([[0, 3, 5, 8]])
    config = LoRAConfig(rank=2, init="pissa", targets=("table", "conv"))
    adapter = lora.init(jax.random.key(0), fn, params, config, ids)
    assert all(is_offset(x) and np.any(x.a0) for x in adapter.values())
    lifted = lora.lift(fn, strict=True)(lora.bind(params, adapter), ids)
    np.testing.assert_array_equal(lifted, fn(params, ids))


def test_both_uses_of_a_tied_table_start_as_they_were():
    """PEFT takes the part of the head off the embedding, too."""
    params, ids = {"table": normal(9, 6)}, jnp.array([1, 4])
    fn = lambda p, ids: jnp.tanh(p["table"][ids]) @ p["table"].T
    config = LoRAConfig(rank=2, init="olora", targets=("table",))
    adapter = lora.init(jax.random.key(0), fn, params, config, ids)
    lifted = lora.lift(fn, strict=True)(lora.bind(params, adapter), ids)
    np.testing.assert_array_equal(lifted, fn(params, ids))


def test_a_rank_that_the_kernel_does_not_have_is_refused():
    """PEFT makes tensors of another rank than its config says."""
    params, fn = {"w": normal(5, 9)}, lambda p, x: x @ p["w"]
    config = LoRAConfig(rank=8, init="pissa", targets=("w",))
    with pytest.raises(ValueError, match="rank"):
        lora.init(jax.random.key(0), fn, params, config, normal(2, 5))


def test_a_bfloat16_base_keeps_the_sum_to_its_own_precision():
    """PEFT rounds the base without its part: the two together are off by 2e-3."""
    u, _, vh = np.linalg.svd(RNG.normal(size=(30, 20)), full_matrices=False)
    w = jnp.asarray(u * 2.0 ** (2 - np.arange(20)) @ vh, jnp.bfloat16)  # values far apart
    node = make(w, init="pissa")
    assert node.a.dtype == jnp.float32
    np.testing.assert_array_equal(node.merge(w), w)
    assert_close(product(node)[0], principal(np.asarray(w, np.float64), 3, slice)[0], **EXACT)


@pytest.mark.slow
def test_a_quantized_base_starts_as_itself():
    stored = lora.quantize({"w": normal(3, 64, 64) / 8}, "nf4", like={"w": "bio"})
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    x, config = normal(4, 64), LoRAConfig(rank=4, init="pissa", targets=("w",))
    adapter = lora.init(jax.random.key(0), fn, stored, config, x)
    run = jax.jit(lambda p, a, x: lora.lift(fn, strict=True)(lora.bind(p, a), x))
    want = jax.jit(lambda p, x: lora.lift(fn)(p, x))(stored, x)
    np.testing.assert_array_equal(run(stored, adapter, x), want)
