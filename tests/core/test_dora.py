"""DoRA against its definition, `m ⊙ V / ‖V‖` with the norm taken for a constant, in float64 by numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.factors import delta, factor_shapes
from lora_jax.methods import output_norms
from lora_jax.methods.dora import DoRA, DoRAOffset
from lora_jax.methods.output_norms import compute_change, compute_gain, compute_norms
from lora_jax.models import registry
from tests.helpers import slow

RNG = np.random.default_rng(0)
SHAPES = {
    "io": (12, 6), "bio": (3, 12, 6), "oi": (6, 12), "ioo": (12, 3, 2), "iio": (4, 3, 6),
    "iiio": (3, 3, 4, 5), "bbio": (2, 3, 12, 6), "ibo": (12, 3, 6),
}  # fmt: skip
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)


def make(w, axes, *, rank=2, b_is_zero=False):
    a, b = factor_shapes(w.shape, axes, rank)
    norm = compute_norms(jnp.asarray(w), axes)
    b = np.zeros(b, np.float32) if b_is_zero else draw(*b)
    magnitude = norm * (1 if b_is_zero else 1 + 0.3 * draw(*norm.shape))
    return DoRA(jnp.asarray(draw(*a)), jnp.asarray(b), magnitude, norm, 1.5, axes=axes)


def make_offset(w, axes, *, rank=2):
    """The same with a term that is taken off."""
    node = make(w, axes, rank=rank)
    a0, b0 = (x + 0.5 * draw(*x.shape) for x in (node.a, node.b))
    return DoRAOffset(node.a, node.b, a0, b0, node.magnitude, node.norm, 1.5, axes=axes)


KINDS = {"dora": make, "dora_offset": make_offset}


def sum_up(w, node):
    """``V``, and its norms spread over the kernel, in float64."""
    wide, axes = lambda x: np.asarray(x, np.float64), node.axes
    letters = "cdefgh"[: len(axes)]
    of = lambda role: "".join(x for x, r in zip(letters, axes, strict=True) if r == role)
    i, o, b = of("i"), of("o"), of("b")
    multiply = lambda x, y: np.einsum(f"{b}{i}r,{b}r{o}->{letters}", wide(x), wide(y))
    change = multiply(node.a, node.b)
    if isinstance(node, DoRAOffset):
        change -= multiply(node.a0, node.b0)
    v = wide(w) + node.scale * change
    spread = lambda x: np.einsum(f"{b}{o},{letters}->{letters}", wide(x), np.ones_like(v))
    return v, np.sqrt(spread(np.einsum(f"{letters},{letters}->{b}{o}", v, v))), spread


def define(w, node):
    """``m ⊙ V / ‖V‖`` in float64."""
    v, norm, spread = sum_up(w, node)
    return spread(node.magnitude) * v / norm


# ---- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", slow.after(2, SHAPES))
@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_the_definition(kind, axes):
    w = draw(*SHAPES[axes])
    node = KINDS[kind](w, axes)
    merged = jax.jit(lora.merge)({"w": jnp.asarray(w)}, {"w": node})["w"]
    # Some ten float32 roundings of values of order one.
    np.testing.assert_allclose(merged, define(w, node), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("axes", slow.after(1, ["bio", "oi", "ioo", "ibo"]))
def test_what_the_sum_adds_to_the_norm(axes, dtype):
    """A kernel of 16 bits is taken as it is: the error is that of float32."""
    w = jnp.asarray(draw(*SHAPES[axes]), dtype)
    node = make(w, axes)
    found = compute_change(w, node.a, 1.5 * node.b, axes)
    inputs = tuple(k for k, role in enumerate(axes) if role == "i")
    wide = np.asarray(w, np.float64)
    summed = wide + np.asarray(delta(node.a, 1.5 * node.b, axes), np.float64)
    want = (summed**2).sum(inputs) - (wide**2).sum(inputs)
    kept = [role for role in axes if role != "i"]
    want = want.transpose([k for r in "bo" for k, role in enumerate(kept) if role == r])
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_of_16_bits_have_the_precision_of_32(dtype):
    """As accelerators compute them: two products of 16 bits, which are summed in float32."""
    w, a = jnp.asarray(draw(12, 6), dtype), jnp.asarray(draw(12, 2))
    found = output_norms.project_in_halves(w, a, "io")
    want = np.asarray(a, np.float64).T @ np.asarray(w, np.float64)
    np.testing.assert_allclose(found, want, rtol=0, atol=3e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_take_the_norm_for_a_constant(kind):
    w, x, probe = draw(12, 6), draw(5, 12), draw(5, 6)
    node = KINDS[kind](w, "io")
    run = lambda node: jnp.sum(probe * (x @ node.merge(jnp.asarray(w))))
    lifted = lambda node: jnp.sum(
        probe * lora.lift(lambda p: x @ p["w"], strict=True)(lora.bind({"w": jnp.asarray(w)}, {"w": node}))
    )  # fmt: skip
    wide = lambda x: np.asarray(x, np.float64)
    v, (norm, *_), _ = sum_up(w, node)
    of_kernel = wide(x).T @ probe  # the gradient of W'
    gain = wide(node.magnitude) / norm
    want = {
        "a": 1.5 * (of_kernel * gain) @ wide(node.b).T,
        "b": 1.5 * wide(node.a).T @ (of_kernel * gain),
        "magnitude": (of_kernel * v).sum(0) / norm,
    }
    for found in (jax.grad(run)(node), jax.grad(lifted)(node)):
        for name, value in want.items():
            np.testing.assert_allclose(getattr(found, name), value, rtol=1e-4, atol=1e-4)
        assert not np.any(found.norm)


STARTS = [(jnp.bfloat16, "uniform"), (jnp.bfloat16, "pissa"), (jnp.float32, "uniform"), (jnp.float32, "olora"), (jnp.float32, "milora")]  # fmt: skip


@pytest.mark.parametrize(("dtype", "init"), slow.after(2, STARTS))
def test_starts_as_the_base_bit_for_bit(dtype, init):
    """Eager and compiled, lifted and merged, also where outputs are zero or tiny."""
    w = draw(64, 32)
    w[:, 3], w[:, 5] = 0, w[:, 5] * 1e-17
    params = {"w": jnp.asarray(w, dtype), "bias": jnp.asarray(draw(32), dtype)}
    x = jnp.asarray(draw(16, 64), dtype)
    fn = lambda p, x: jnp.tanh(x @ p["w"] + p["bias"][None])
    config = lora.LoRAConfig(rank=4, method="dora", init=init)
    adapter = lora.init(jax.random.key(0), fn, params, config, x)
    assert type(adapter["w"]) is (DoRA if init == "uniform" else DoRAOffset)
    lifted = lambda a, p, x: lora.lift(fn, strict=True)(lora.bind(p, a), x)
    np.testing.assert_array_equal(lora.merge(params, adapter)["w"], params["w"])
    np.testing.assert_array_equal(lifted(adapter, params, x), fn(params, x))
    np.testing.assert_array_equal(jax.jit(lifted)(adapter, params, x), jax.jit(fn)(params, x))


def test_rows_of_zeros_are_learned_without_nan():
    """PEFT divides by zero there; here such an output starts at zero, and learns."""
    w = draw(12, 6)
    w[:, 2] = 0
    params, x, y = {"w": jnp.asarray(w)}, draw(40, 12), draw(40, 6)
    fn = lambda p: x @ p["w"]
    config = lora.LoRAConfig(rank=2, method="dora")
    adapter = lora.init(jax.random.key(0), fn, params, config)
    loss = lambda a: jnp.mean((lora.lift(fn)(lora.bind(params, a)) - y) ** 2)

    @jax.jit
    def step(adapter):
        grads, trained = jax.grad(loss)(adapter), lora.mask(adapter)
        return jax.tree.map(lambda x, g, t: x - 0.1 * g if t else x, adapter, grads, trained)

    for _ in range(5):
        adapter = step(adapter)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(adapter))
    merged = lora.merge(params, adapter)["w"]
    assert np.all(np.isfinite(merged)) and np.any(merged[:, 2])


def test_gains_at_the_borders():
    gain = lambda *x: float(compute_gain(*map(jnp.float32, x)))
    assert gain(2, 2, 0) == 1
    assert gain(0, 0, 0) == 1  # zeros stay zeros
    assert gain(3, 0, 4) == pytest.approx(1.5)  # a kernel of zeros has the norm of the term alone
    assert gain(0, 2, 0) == 0
    assert gain(-1, 2, 0) == -0.5
    assert np.isfinite(gain(1, 1, -1)) and np.isfinite(gain(1, 1, -1.0001))  # V is nearly zero


def test_no_sum_is_formed_and_no_copy_in_another_precision():
    """The jaxpr has no array of the kernel's shape but the kernel, forwards and backwards."""
    w = jnp.asarray(draw(12, 6))
    node = make(w, "io")
    run = lambda n, w, x: jnp.sum(lora.lift(lambda p: x @ p["w"])(lora.bind({"w": w}, {"w": n})))
    jaxpr = jax.make_jaxpr(jax.grad(run))(node, w, jnp.ones((5, 12)))
    eqns = list(_all_equations(jaxpr.jaxpr))
    made = {(v.aval.shape, str(eqn.primitive)) for eqn in eqns for v in eqn.outvars}
    assert {name for shape, name in made if shape in ((12, 6), (6, 12))} <= {"stop_gradient"}


def _all_equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
                yield from _all_equations(inner)


def test_dropout_is_on_the_branch_alone():
    """In PEFT the recomputed product with the frozen kernel has it, too."""
    w, x = draw(12, 6), draw(5, 12)
    silent = dataclasses.replace(make(w, "io", b_is_zero=True), dropout=0.5)
    silent = dataclasses.replace(silent, magnitude=2 * silent.norm)
    bound = lora.bind({"w": jnp.asarray(w)}, {"w": silent})
    run = lora.lift(lambda p: x @ p["w"], dropout_key=jax.random.key(0))
    np.testing.assert_allclose(run(bound), 2 * x @ w, rtol=1e-4, atol=1e-5)


# ---- Where kernels come from ---------------------------------------------------------------------


def test_shapes_alone_are_refused():
    shape = {"w": jax.ShapeDtypeStruct((12, 6), jnp.float32)}
    config = lora.LoRAConfig(rank=2, method="dora")
    with pytest.raises(ValueError, match=r"method='dora' needs the numbers of 'w', and got its sh"):
        lora.init(jax.random.key(0), lambda p: jnp.ones((5, 12)) @ p["w"], shape, config)


def test_adapters_are_made_under_jit():
    params, x = {"w": jnp.asarray(draw(12, 6))}, jnp.ones((5, 12))
    fn = lambda p: x @ p["w"]
    start = functools.partial(lora.init, jax.random.key(0), fn, config=lora.LoRAConfig(rank=2, method="dora"))  # fmt: skip
    got, want = jax.jit(lambda p: start(params=p))(params), start(params=params)
    jax.tree.map(np.testing.assert_array_equal, got["w"].norm, want["w"].norm)


@pytest.mark.parametrize(
    ("scheme", "init"), slow.after(1, [("nf4", "uniform"), ("int8", "uniform"), ("nf4", "pissa")])
)
def test_a_quantized_base(scheme, init):
    """The norms are those of the numbers that the codes stand for, layer by layer."""
    w, x = jnp.asarray(draw(3, 64, 32) / 8, jnp.bfloat16), jnp.asarray(draw(5, 64), jnp.bfloat16)
    fn = lambda p, x: jax.lax.scan(lambda x, w: (x, jnp.tanh(x @ w)), x, p["w"])[1]
    params = lora.quantize({"w": w}, scheme, like={"w": "bio"})
    config = lora.LoRAConfig(rank=2, method="dora", init=init)
    adapter = lora.init(jax.random.key(0), fn, params, config, x)
    lifted = jax.jit(lambda a, p, x: lora.lift(fn, strict=True)(lora.bind(p, a), x))
    base = jax.jit(lambda p, x: lora.lift(fn)(p, x))(params, x)
    np.testing.assert_array_equal(lifted(adapter, params, x), base)
    node = adapter["w"]
    node = dataclasses.replace(node, b=node.b + jnp.asarray(draw(*node.b.shape)) / 64, magnitude=1.3 * node.norm)  # fmt: skip
    plain = lora.merge(params, {})
    want = lora.merge(plain, {"w": node})
    got = lora.merge(params, {"w": node})
    np.testing.assert_allclose(*(np.asarray(t["w"], np.float32) for t in (got, want)), rtol=2**-6, atol=2**-6)  # fmt: skip
    outputs = lifted({"w": node}, params, x), fn(want, x)
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in outputs), rtol=0, atol=0.04)


# ---- Devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [(None, "m"), ("m", None)])
def test_explicit_sharding(spec):
    mesh = jax.make_mesh((1,), ("m",), axis_types=(AxisType.Explicit,))
    put = lambda x, *spec: jax.device_put(jnp.asarray(x), NamedSharding(mesh, P(*spec)))
    w, x = draw(4, 6), draw(5, 4)
    made = make(w, "io")
    inputs, outputs = spec
    split = {
        "a": put(made.a, inputs), "b": put(made.b, None, outputs),
        "magnitude": put(made.magnitude, outputs), "norm": put(made.norm, outputs),
    }  # fmt: skip
    with jax.set_mesh(mesh):
        params, adapter = {"w": put(w, *spec)}, {"w": dataclasses.replace(made, **split)}
        fn = lambda p, x: jnp.einsum("zi,io->zo", x, p["w"], out_sharding=P(None, outputs))
        run = lambda a, p, x: lora.lift(fn, strict=True)(lora.bind(p, a), x)
        got = jax.jit(run)(adapter, params, put(x, None, inputs))
    np.testing.assert_allclose(got, x @ define(w, made), rtol=1e-5, atol=1e-5)


# ---- What it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_ranks_changes_nothing(kind):
    """As in a sweep over ranks, which share a program."""
    w = jnp.asarray(draw(12, 6))
    node = KINDS[kind](w, "io")
    columns, rows = ((0, 0), (0, 3)), ((0, 3), (0, 0))
    paddings = {"a": columns, "a0": columns, "b": rows, "b0": rows}
    padded = {n: jnp.pad(getattr(node, n), x) for n, x in paddings.items() if n in node.table}
    wide = dataclasses.replace(node, **padded)
    merge = jax.jit(lambda node: node.merge(w))
    np.testing.assert_allclose(merge(wide), merge(node), rtol=1e-6, atol=1e-6)
    grads = jax.jit(jax.grad(lambda n: jnp.sum(n.merge(w) ** 2)))(wide)
    assert not np.any(grads.a[:, 2:]) and not np.any(grads.b[2:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets, most", [(("q_proj", "v_proj"), 1.1), (("all-linear",), 1.35)], ids=["few", "all"]
)
def test_cost_of_a_step_beside_plain_lora(targets, most):
    """FLOPs, and temporary memory: gradients of magnitudes keep the products that they scale."""
    sizes = dict(
        model_type="llama", vocab_size=512, hidden_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, intermediate_size=768,
        max_position_embeddings=256, rms_norm_eps=1e-5,
    )  # fmt: skip
    family = registry.find(sizes)
    model = family.models["causal-lm"](family.config.from_hf(sizes), scan_layers=False)
    ids = jnp.zeros((4, 128), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), shapes)

    def measure(method):
        config = lora.LoRAConfig(rank=8, targets=targets, method=method)
        adapter = lora.init(jax.random.key(0), model.apply, params, config, ids)
        loss = lambda a, p: jnp.mean(lora.lift(model.apply)(lora.bind(p, a), ids) ** 2)
        compiled = jax.jit(jax.value_and_grad(loss)).lower(adapter, params).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        return np.array([compiled.cost_analysis()["flops"], memory])

    flops, memory = measure("dora") / measure("lora")
    assert flops <= 1.03 and memory <= most
