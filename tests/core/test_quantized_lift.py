"""Functions of quantized parameters: ``lift`` equals the function of the decoded ones.

On models of the zoo, with every scheme; and that no pass holds the numbers of more than one layer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax.kernels import KERNEL
from lora_jax.quantized import as_array, is_quantized
from lora_jax.schemes import SCHEMES, encode
from tests.helpers import slow, zoo
from tests.helpers.comparisons import assert_close, perturbed

SMALL = 4  # kernels of the zoo have eight inputs and more


def decoded(tree):
    return jax.tree.map(as_array, tree, is_leaf=is_quantized)


def quantized(model, scheme="nf4"):
    """Every kernel of a model, in small blocks, heads and all, if a block divides its inputs."""
    table = lora.tabulate(model.fn, model.params, lora.LoRAConfig(), model.x)
    block = SMALL if SCHEMES[scheme].block else None
    leaves = adapters.base_leaves(model.params)

    def made(name, x):
        leaf = table.rows[name].leaf
        if leaf.kind != KERNEL or x.size < (block or 1):
            return x
        inputs = np.prod([n for n, role in zip(x.shape, leaf.axes, strict=True) if role == "i"])
        fits = scheme != "int4" or inputs % SMALL == 0
        return encode(x, scheme, leaf.axes, block=block) if fits else x

    return jax.tree.structure(model.params).unflatten([made(n, x) for n, x in leaves.items()])


class Case:
    def __init__(self, name, scheme):
        self.model = zoo.ZOO[name]()
        self.params = quantized(self.model, scheme)
        self.plain = decoded(self.params)
        self.config = lora.LoRAConfig(rank=2, alpha=3.0, targets=self.model.targets)
        fn, x = self.model.fn, self.model.x
        self.adapter = perturbed(lora.init(jax.random.key(1), fn, self.params, self.config, x))

    @functools.cached_property
    def merged(self):
        return jax.jit(self.run_merged)(self.adapter, self.plain)

    def run_merged(self, adapter, params):
        return self.model.fn(lora.merge(params, adapter), self.model.x)

    def run(self, adapter, params, **options):
        bound = lora.bind(params, adapter)
        return lora.lift(self.model.fn, strict=True, **options)(bound, self.model.x)

    def gradient(self, run, params):
        weights = np.random.default_rng(9).normal(size=self.merged.shape).astype(np.float32)
        loss = lambda adapter, params: jnp.sum(weights * run(adapter, params))
        return jax.jit(jax.grad(loss))(self.adapter, params)


@functools.cache
def case(name, scheme="nf4"):
    return Case(name, scheme)


# Every construction with one scheme, and every scheme on scanned and on unrolled layers.
PAIRS = [(name, "nf4") for name in zoo.ZOO]
PAIRS += [(name, s) for s in SCHEMES if s != "nf4" for name in ("scanned_remat", "attention")]


def pairs(*, slow):
    """Constructions with schemes, some of which are slow."""
    group, late = pytest.mark.xdist_group, pytest.mark.slow
    marks = lambda pair: [group(pair[0])] + [late] * slow(*pair)
    return pytest.mark.parametrize(
        ("name", "scheme"), [pytest.param(*pair, marks=marks(pair)) for pair in PAIRS]
    )


SOME = ("mlp", "scanned_remat", "attention", "conv", "experts", "tied", "nnx")
widely = pairs(
    slow=lambda name, scheme: (
        name not in SOME
        or scheme != "nf4"
        and (name, scheme) not in {("attention", "int8"), ("attention", "float8_e4m3_blocks")}
    )
)
both = pairs(slow=lambda name, scheme: (name, scheme) != ("scanned_remat", "nf4"))


@widely
def test_lift_equals_merge_of_the_decoded_base(name, scheme):
    c = case(name, scheme)
    assert any(map(is_quantized, jax.tree.leaves(c.params, is_leaf=is_quantized)))
    assert_close(jax.jit(c.run)(c.adapter, c.params), c.merged)
    merged = lora.merge(c.params, c.adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(c.model.params)
    assert_close(merged, lora.merge(c.plain, c.adapter), rtol=1e-6, atol=1e-6)


@both
def test_gradients_equal_those_over_the_decoded_base(name, scheme):
    c = case(name, scheme)
    want = c.gradient(c.run_merged, c.plain)
    assert_close(c.gradient(c.run, c.params), want, rtol=1e-4, atol=1e-4)


@both
def test_runs_without_an_adapter(name, scheme):
    c = case(name, scheme)
    got = jax.jit(lora.lift(c.model.fn, strict=True))(c.params, c.model.x)
    assert_close(got, jax.jit(c.model.fn)(c.plain, c.model.x))


some = pytest.mark.parametrize(
    "name", slow.after(1, ["plain", "scanned", "experts", "attention", "tied", "nnx"])
)


@some
def test_eager_equals_jit(name):
    c = case(name)
    assert_close(c.run(c.adapter, c.params), c.merged)
    assert_close(lora.lift(c.model.fn)(c.params, c.model.x), c.model.fn(c.plain, c.model.x))


@some
def test_vmap_over_adapters(name):
    c = case(name)
    several = [perturbed(c.adapter, seed=s) for s in range(2)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *several)
    got = jax.jit(jax.vmap(c.run, (0, None)))(stacked, c.params)
    assert_close(got, jnp.stack([c.run_merged(a, c.plain) for a in several]))


@some
@pytest.mark.slow
def test_dropout_is_that_over_the_decoded_base(name):
    """The same key drops the same inputs."""
    c = case(name)
    run = jax.jit(functools.partial(c.run, dropout=0.4, dropout_key=jax.random.key(3)))
    assert_close(run(c.adapter, c.params), run(c.adapter, c.plain))
    assert not np.allclose(run(c.adapter, c.params), c.merged, atol=1e-3)


@some
def test_init_and_tabulate_see_arrays(name):
    c = case(name)
    fn, x, key = c.model.fn, c.model.x, jax.random.key(1)
    plain = lora.init(key, fn, c.plain, c.config, x)
    jax.tree.map(np.testing.assert_array_equal, lora.init(key, fn, c.params, c.config, x), plain)
    shapes = jax.eval_shape(lambda x: x, c.params)
    jax.tree.map(np.testing.assert_array_equal, lora.init(key, fn, shapes, c.config, x), plain)
    table = lambda params: str(lora.tabulate(fn, params, c.config, x))
    assert table(c.params) == table(c.plain)
    assert lora.summary(c.params, c.adapter) == lora.summary(c.plain, c.adapter)


@some
def test_explain_says_that_all_stays_factored(name):
    c = case(name)
    uses = lora.explain(c.model.fn, c.params, c.adapter, c.model.x).kernels
    assert uses and not any(use.fallbacks for use in uses.values())
    abstract = jax.eval_shape(lambda x: x, c.params)
    assert lora.explain(c.model.fn, abstract, c.adapter, c.model.x).kernels == uses


def test_labels_of_a_bound_tree():
    c = case("scanned")
    bound = lora.bind(c.params, c.adapter)
    labels = lora.labels(bound)
    assert jax.tree.structure(labels) == jax.tree.structure(bound)
    n = len(jax.tree.leaves(c.adapter))
    assert sum(x == "trainable" for x in jax.tree.leaves(labels)) == n
    assert lora.mask(bound)["params"]["blocks"]["up"]["kernel"].w.codes is False


def test_saved_adapters_fit(tmp_path):
    c = case("scanned")
    lora.save(tmp_path, c.adapter, c.config, base="x")
    adapter, _ = lora.load(tmp_path, c.params, base="x")
    jax.tree.map(np.testing.assert_array_equal, adapter, c.adapter)


def test_leaf_trained_in_full_is_decoded():
    model = zoo.ZOO["mlp"]()
    params = quantized(model)
    config = lora.LoRAConfig(targets=("up",), rank=2, train=("head/kernel", "down"))
    adapter = lora.init(jax.random.key(0), model.fn, params, config, model.x)
    down = params["params"]["down"]["kernel"]
    np.testing.assert_array_equal(adapter["params"]["down"]["kernel"], as_array(down))
    run = lambda adapter: lora.lift(model.fn)(lora.bind(params, adapter), model.x)
    assert_close(run(adapter), model.fn(decoded(params), model.x))
    assert np.any(jax.grad(lambda a: run(a).sum())(adapter)["params"]["down"]["kernel"])


def test_merge_rounds_once():
    """The sum of unrounded numbers and the change, in bfloat16; decoding first would round twice."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    leaf = encode(w, "nf4", dtype=jnp.bfloat16)
    fn = lambda p, x: x @ p["w"]
    config = lora.LoRAConfig(rank=2, targets=("w",))
    adapter = perturbed(lora.init(jax.random.key(0), fn, {"w": leaf}, config, jnp.ones(64)))
    got = lora.merge({"w": leaf}, adapter)["w"]
    wide = encode(w, "nf4")
    want = lora.merge({"w": wide}, adapter)["w"].astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want)


# ---- Moves ----------------------------------------------------------------------------------------

MOVES = {
    "transposed": lambda w, x: x @ w.T.T,
    "reshaped": lambda w, x: jnp.einsum("bi,iho->bho", x, w.reshape(16, 4, 6)).reshape(3, 24),
    "sliced": lambda w, x: x @ w[:, 3:9],
    "of rows": lambda w, x: x[:, :4] @ w[2:10:2],
    "cast": lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    "expanded": lambda w, x: jnp.einsum("bi,aio->bo", x, w[None]),
    "broadcast": lambda w, x: jnp.einsum("ai,aio->o", x, jnp.broadcast_to(w[None], (3, 16, 24))),
    "scaled": lambda w, x: x @ (w * 3.0),
    "negative": lambda w, x: x @ -w,
    "joined": lambda w, x: x @ jnp.concatenate([w, w], 1),
    "turned": lambda w, x: jnp.einsum("bo,io->bi", jnp.tile(x, 2)[:, :24], w),
    "reversed": lambda w, x: x @ w[::-1],
    "looked up": lambda w, x: w[jnp.array([1, 5, 5])],
    "stopped": lambda w, x: x @ jax.lax.stop_gradient(w),
    "nested": lambda w, x: jax.jit(lambda w, x: x @ w)(w.T.T, x),
    "branched": lambda w, x: jax.lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x @ w * 2, w),
    "twice": lambda w, x: (x @ w) @ w.T,
    "squared": lambda w, x: x @ (w @ w.T),
    "shown": lambda w, x: x @ w + w.mean(0)[None],
    "mapped": lambda w, x: jax.vmap(lambda x, w: x @ w, (0, None))(x, w),
}  # fmt: skip


@pytest.mark.parametrize("adapted", slow.after(1, [True, False]), ids=["adapted", "frozen"])
@pytest.mark.parametrize("move", MOVES)
def test_moves(move, adapted):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)
    w, x = {"w": encode(draw(16, 24), "nf4", block=8)}, draw(3, 16)
    fn = lambda p, x: MOVES[move](p["w"], x)
    check(fn, w, x, "io" if adapted else "", tolerance=0.05 if move == "cast" else 2e-5)


STACKS = {
    "picked by number": lambda w, x: x @ w[1],
    "from the end": lambda w, x: x @ w[-1],
    "some": lambda w, x: jnp.einsum("bi,lio->bo", x, w[1:3]),
    "by data": lambda w, x: x @ w[jnp.argmax(x.sum(1))],
    "by data each": lambda w, x: jnp.einsum("bi,bio->bo", x, w[jnp.argsort(x.sum(1))]),
    "in a loop": lambda w, x: jax.lax.fori_loop(
        0, 3, lambda k, y: jnp.tanh(jnp.tile(y @ w[k], 2)[:, :16]), x
    ),
    "scanned": lambda w, x: jax.lax.scan(lambda y, w: (jnp.tile(y @ w, 2)[:, :16], None), x, w)[0],
    "scanned and handed out": lambda w, x: jax.lax.scan(lambda y, w: (y + 1, w), x, w)[1][2],
    "iterated": lambda w, x: sum(x @ k for k in w),
    "all at once": lambda w, x: jnp.einsum("bi,lio->lbo", x, w),
    "split in two": lambda w, x: jnp.einsum("bi,alio->bo", x, w[:2].reshape(1, 2, 16, 12)),
    "mapped": lambda w, x: jax.vmap(lambda w: x @ w)(w),
    "moved": lambda w, x: jnp.einsum("bi,iol->bo", x, jnp.moveaxis(w, 0, -1)),
}


@pytest.mark.parametrize("adapted", slow.after(1, [True, False]), ids=["adapted", "frozen"])
@pytest.mark.parametrize("move", STACKS)
def test_stacks(move, adapted):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)
    w, x = {"w": encode(draw(3, 16, 12), "nf4", "bio", block=8)}, draw(3, 16)
    fn = lambda p, x: STACKS[move](p["w"], x)
    check(fn, w, x, "bio" if adapted else "")


@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "frozen"])
@pytest.mark.parametrize("axis", [1, 2])
def test_stacks_along_other_axes(axis, adapted):
    """As with a scan over parameters that lie along their second axis."""
    axes = "iob"[:axis] + "b" + "io"[axis:]
    shape = [16, 12]
    shape.insert(axis, 3)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)
    w, x = {"w": encode(draw(*shape), "nf4", axes, block=8)}, draw(3, 16)
    step = lambda y, w: (jnp.tile(y @ w, 2)[:, :16], None)
    fn = lambda p, x: jax.lax.scan(step, x, jnp.moveaxis(p["w"], axis, 0))[0]
    check(fn, w, x, axes if adapted else "")


def check(fn, w, x, axes, tolerance=2e-5):
    """Values and gradients are those over the decoded kernel."""
    if not axes:
        loss = lambda lifted: lambda x: jnp.sum(jnp.sin(lifted(x).astype(jnp.float32)))
        got, want = loss(lambda x: lora.lift(fn)(w, x)), loss(lambda x: fn(decoded(w), x))
        close = functools.partial(assert_close, rtol=tolerance, atol=tolerance)
        close(jax.jit(got)(x), jax.jit(want)(x))
        close(jax.jit(jax.grad(got))(x), jax.jit(jax.grad(want))(x))
        return
    config = lora.LoRAConfig(rank=2, targets=("w",), roles={"w": axes})
    adapter = perturbed(lora.init(jax.random.key(0), fn, w, config, x))
    lifted = lambda a: jnp.sum(jnp.sin(lora.lift(fn)(lora.bind(w, a), x).astype(jnp.float32)))
    merged = lambda a: jnp.sum(jnp.sin(fn(lora.merge(decoded(w), a), x).astype(jnp.float32)))
    (y, g), (y0, g0) = (jax.jit(jax.value_and_grad(f))(adapter) for f in (lifted, merged))
    assert_close(y, y0, rtol=10 * tolerance, atol=10 * tolerance)
    assert_close(g, g0, rtol=20 * tolerance, atol=20 * tolerance)


# ---- Memory ---------------------------------------------------------------------------------------

LAYERS, WIDTH, ROWS = 12, 1024, 64
KERNEL_BYTES = 4 * WIDTH * WIDTH


def scanned(remat):
    """Layers in one scan; what each keeps for the backward pass is its input, and one array more."""

    def layer(x, w):
        return jax.nn.relu(x @ w), None

    def fn(params, x):
        body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        return jax.lax.scan(body, x, params["w"])[0].sum()

    return fn


def megabytes(scheme, remat, *, adapted=True):
    """Arguments and temporaries of one gradient, by XLA's own account."""
    w = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    params, fn = {"w": w}, scanned(remat)
    config = lora.LoRAConfig(rank=8, targets=("w",))
    adapter = jax.eval_shape(lambda key: lora.init(key, fn, params, config, x), jax.random.key(0))
    if scheme:
        params = lora.quantize(params, scheme, like=adapter)
    if adapted:
        run = jax.grad(lambda a, p, x: lora.lift(fn, strict=True)(lora.bind(p, a), x))
    else:
        run = jax.grad(lambda x, p: lora.lift(fn)(p, x))
    args = (adapter, params, x) if adapted else (x, params)
    # As users have it; the tests' own setting, for fast compilation, keeps more.
    options = {"xla_backend_optimization_level": 3}
    memory = jax.jit(run).lower(*args).compile(options).memory_analysis()
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6


@pytest.mark.parametrize("remat", [False, True])
def test_memory_of_a_gradient(remat):
    dense, small = megabytes(None, remat), megabytes("nf4", remat)
    assert 58 < dense < 67
    assert small < 18
    assert megabytes("nf4_double", remat) < 18
    assert megabytes("int8", remat) < 24


def test_memory_of_a_reference_pass():
    """Without an adapter, as for the model to compare with."""
    assert megabytes("nf4", False, adapted=False) < 16


@pytest.mark.parametrize("scheme", ["nf4", "int8", "float8_e4m3_blocks"])
def test_no_pass_holds_the_numbers_of_all_layers(scheme):
    """Neither pass has an array of all kernels, in any float."""
    w = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
    params = lora.quantize({"w": w}, scheme, like={"w": "bio"})
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    run = jax.jit(jax.grad(lambda x, p: lora.lift(scanned(True))(p, x)))
    text = run.lower(x, params).compile().as_text()
    assert f"f32[{WIDTH},{WIDTH}]" in text
    assert f"f32[{LAYERS},{WIDTH},{WIDTH}]" not in text
    assert f"f16[{LAYERS},{WIDTH},{WIDTH}]" not in text


# ---- Which kernels --------------------------------------------------------------------------------


class TestQuantize:
    def setup_method(self):
        rng = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
        self.params = {
            "embed": draw(20, 16), "norm": {"scale": draw(16)},
            "layers": {"up": {"kernel": draw(3, 16, 24), "bias": draw(3, 24)}},
            "small": {"kernel": draw(16, 3)}, "out": {"kernel": draw(24, 16)},
            "lm_head": {"kernel": draw(16, 20)},
        }  # fmt: skip
        self.ids = jnp.array([1, 2])
        self.table = lora.tabulate(self.fn, self.params, lora.LoRAConfig(), self.ids)

    @staticmethod
    def fn(p, ids):
        x = p["embed"][ids] * p["norm"]["scale"][None]
        for k in range(3):
            y = x @ p["layers"]["up"]["kernel"][k] + p["layers"]["up"]["bias"][k][None]
            x = x + jnp.tanh(y) @ p["out"]["kernel"]
        x = x + (x @ p["small"]["kernel"]).sum(-1, keepdims=True)
        return x @ p["lm_head"]["kernel"] + x @ p["embed"].T

    def names(self, **options):
        made = lora.quantize(self.params, **options)
        return {n for n, x in adapters.base_leaves(made).items() if is_quantized(x)}

    def test_kernels_by_default(self):
        """No head, no embedding, which is a head too here, no norm, and nothing below a block."""
        assert self.names(like=self.table) == {"layers/up/kernel", "out/kernel"}

    def test_chosen_ones(self):
        assert self.names(like=self.table, targets=("lm_head",)) == {"lm_head/kernel"}
        assert self.names(like=self.table, targets=("embed",)) == {"embed"}
        both = ("all-linear", "lm_head")
        assert len(self.names(like=self.table, targets=both)) == 3
        assert self.names(like=self.table, skip=("up", "lm_head")) == {"out/kernel"}
        assert len(self.names(like=self.table, skip=(), block=16)) == 4

    def test_like_an_adapter(self):
        config = lora.LoRAConfig(rank=2, targets=("up", "lm_head"))
        adapter = lora.init(jax.random.key(0), self.fn, self.params, config, self.ids)
        assert self.names(like=adapter) == {"layers/up/kernel"}

    def test_like_roles(self):
        assert self.names(like={"up/kernel": "bio", "kernel": "io"}, targets=("up",)) == {
            "layers/up/kernel"
        }
        made = lora.quantize(self.params, like={"up/kernel": "bio"})
        assert made["layers"]["up"]["kernel"].roles == "bio"

    def test_keeps_the_rest(self):
        made = lora.quantize(self.params, "int8", like=self.table, dtype=jnp.bfloat16)
        assert made["embed"] is self.params["embed"]
        kernel = made["layers"]["up"]["kernel"]
        assert (kernel.shape, kernel.dtype) == ((3, 16, 24), jnp.bfloat16)
        assert is_quantized(self.params["layers"]["up"]["kernel"]) is False

    def test_twice_is_once(self):
        made = lora.quantize(self.params, like=self.table)
        again = lora.quantize(made, "int8", like=self.table)
        assert again["out"]["kernel"] is made["out"]["kernel"]

    def test_runs(self):
        made = lora.quantize(self.params, like=self.table, block=8)
        got = lora.lift(self.fn)(made, self.ids)
        assert_close(got, self.fn(decoded(made), self.ids))

    @pytest.mark.parametrize(
        "options, says",
        [
            (dict(scheme="nf5"), "no scheme 'nf5'"),
            (dict(targets=("attention",)), "targets entry 'attention' matches no parameter"),
            (dict(targets=("norm",)), r"none of which `like` says what its axes are"),
            (dict(targets=("small",)), "small/kernel has 48 numbers, fewer than a block"),
            (dict(scheme="int4"), "layers/up/kernel has 16 inputs, which blocks of 64"),
            (dict(like={"down": "io"}), "like entry 'down' matches no parameter"),
            (dict(like={"up/kernel": "io"}), r"layers/up/kernel has shape \(3, 16, 24\)"),
        ],
    )
    def test_refuses(self, options, says):
        with pytest.raises(ValueError, match=says):
            lora.quantize(self.params, **{"like": self.table, **options})

    def test_refuses_other_trees(self):
        config = lora.LoRAConfig(rank=2, targets=("up", "lm_head"))
        adapter = lora.init(jax.random.key(0), self.fn, self.params, config, self.ids)
        with pytest.raises(ValueError, match="already bound"):
            lora.quantize(lora.bind(self.params, adapter), like=self.table)
        with pytest.raises(ValueError, match="like has lm_head/kernel, which the parameters lack"):
            lora.quantize({"layers": self.params["layers"]}, like=adapter)
        made = lora.quantize(self.params, like=self.table)
        with pytest.raises(ValueError, match="out/kernel is quantized already"):
            lora.quantize(made, like=self.table, targets=("out",))

    def test_names_what_has_nan(self):
        params = jax.tree.map(lambda x: x.at[0].set(jnp.nan), self.params)
        with pytest.raises(ValueError, match="layers/up/kernel: .* NaN or infinity"):
            lora.quantize(params, like=self.table)

    def test_refuses_integers(self):
        params = {"w": jnp.ones((64, 64), jnp.int32)}
        with pytest.raises(ValueError, match="w holds int32, not floating-point"):
            lora.quantize(params, like={"w": "io"})
