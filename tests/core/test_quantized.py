"""Quantized leaves alone: what is stored, what it stands for, and how JAX handles it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import paths
from lora_jax.code_books import DYNAMIC, TABLES
from lora_jax.quantized import CodeBook, Quantized, abstract, decode, is_quantized, numbers, parts
from lora_jax.schemes import SCHEMES, encode, nest
from tests.helpers import slow
from tests.helpers.places import GOLDENS

CASES = np.load(GOLDENS / "quantized" / "cases.npz")
KERNELS = sorted({name.split("/")[0] for name in CASES.files if name.endswith("/w")})
ROOT_MEAN_SQUARE = {  # of the error, relative to that of normal numbers
    "nf4": 0.095, "nf4_double": 0.095, "fp4": 0.125, "fp4_double": 0.125, "int8": 0.009,
    "int4": 0.105, "float8_e4m3": 0.028, "float8_e4m3_blocks": 0.028,
}  # fmt: skip


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def cases(suffix):
    """The kernels of which bitsandbytes' result with this scheme is known, and its prefix."""
    return [k for k in KERNELS if f"{k}/{suffix}/codes" in CASES.files]


def as_stored(x):
    """What lies in the order ``(in, out)`` as bitsandbytes has it."""
    return np.asarray(x).T.ravel()


# ---- bitsandbytes' own output ---------------------------------------------------------------------


def test_tables_bit_for_bit():
    for name, table in TABLES.items():
        np.testing.assert_array_equal(table, CASES[f"{name}/table"])
    np.testing.assert_array_equal(DYNAMIC, CASES["dynamic"])


@pytest.mark.parametrize("scheme", slow.after(1, ["nf4", "fp4"]))
def test_codes_and_scales_bit_for_bit(scheme):
    for name in cases(scheme):
        w, stored = CASES[f"{name}/w"], f"{name}/{scheme}"
        if w.size < 64:
            continue  # refused; that it is read is below
        leaf = encode(jnp.asarray(w), scheme, "oi")
        np.testing.assert_array_equal(as_stored(leaf.codes), CASES[f"{stored}/codes"].ravel())
        np.testing.assert_array_equal(as_stored(leaf.scales), CASES[f"{stored}/scales"].ravel())
        for made in (decode(leaf), jax.jit(decode)(leaf)):
            np.testing.assert_array_equal(made, CASES[f"{stored}/decoded"])


def from_golden(key, shape):
    """A leaf of the parts that bitsandbytes has stored."""
    n_out, n_in = shape
    by_rows = n_in % 64 == 0
    part = lambda name, columns: (
        CASES[f"{key}/{name}"].reshape(columns, -1).T
        if by_rows
        else CASES[f"{key}/{name}"].reshape(-1, 1)
    )
    nested = {}
    if "double" in key:
        nested = {n: jnp.asarray(CASES[f"{key}/{n}"]) for n in ("nested", "offset")}
    table = key.split("/")[1].removesuffix("_double")
    return CodeBook(
        codes=jnp.asarray(part("codes", n_out)), scales=jnp.asarray(part("scales", n_out)),
        **nested, axes="oi", sizes=shape, dtype=np.dtype(np.float32), table=table, block=64,
    )  # fmt: skip


@pytest.mark.parametrize("scheme", slow.after(2, ["nf4", "fp4", "nf4_double", "fp4_double"]))
def test_what_is_stored_is_decoded_bit_for_bit(scheme):
    for name in cases(scheme):
        key = f"{name}/{scheme}"
        leaf = from_golden(key, CASES[f"{name}/w"].shape)
        for run in (decode, jax.jit(decode)):
            np.testing.assert_array_equal(run(leaf), CASES[f"{key}/decoded"], err_msg=key)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_scales_are_quantized_bit_for_bit(scheme):
    """Given bitsandbytes' mean, whose last digit is a matter of the order of a sum."""
    for name in cases(f"{scheme}_double"):
        w, key = CASES[f"{name}/w"], f"{name}/{scheme}_double"
        if w.size < 64:
            continue
        leaf, offset = encode(jnp.asarray(w), f"{scheme}_double", "oi"), CASES[f"{key}/offset"]
        np.testing.assert_allclose(leaf.offset, offset, rtol=3e-7)
        plain = encode(jnp.asarray(w), scheme, "oi")
        np.testing.assert_array_equal(leaf.codes, plain.codes)
        codes, nested = nest(plain.scales, jnp.asarray(offset))
        np.testing.assert_array_equal(nested, CASES[f"{key}/nested"].reshape(-1))
        if np.all(nested > 0):  # of one block alone the code is 0 / 0, and means nothing
            np.testing.assert_array_equal(as_stored(codes), CASES[f"{key}/scales"])


def test_int8_bit_for_bit():
    for name in cases("int8"):
        key = f"{name}/int8"
        leaf = encode(jnp.asarray(CASES[f"{name}/w"]), "int8", "oi")
        np.testing.assert_array_equal(np.asarray(leaf.codes).T, CASES[f"{key}/codes"])
        np.testing.assert_array_equal(leaf.scales.ravel(), CASES[f"{key}/scales"])
        np.testing.assert_array_equal(decode(leaf), CASES[f"{key}/decoded"])


# ---- Every scheme ---------------------------------------------------------------------------------

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@every_scheme
def test_error_is_that_of_the_scheme(scheme):
    w = normal(256, 384)
    leaf = encode(w, scheme)
    error = np.sqrt(np.mean((decode(leaf) - w) ** 2))
    assert error < ROOT_MEAN_SQUARE[scheme]
    bits = 8 * sum(x.nbytes for x in parts(leaf).values()) / w.size
    assert bits < (4.7 if "4" in scheme and not scheme.startswith("float") else 8.3)


@pytest.mark.parametrize(
    "scheme", slow.after(1, ["nf4_double", "int8", "int4", "float8_e4m3_blocks"])
)
@pytest.mark.parametrize("axes", ["oi", "biio", "oibo", "ibio"])
def test_any_axes(scheme, axes):
    """Each kernel along batch axes has what the matrix of its inputs and outputs has."""
    sizes = {"b": iter([2, 3]), "i": iter([16, 8]), "o": iter([6, 5])}
    shape = tuple(next(sizes[role]) for role in axes)
    w, block = normal(*shape), 8 if SCHEMES[scheme].block else None
    leaf = encode(w, scheme, axes, block=block)
    assert leaf.shape == shape and leaf.ndim == len(axes) and leaf.size == w.size
    order = [k for role in "bio" for k, x in enumerate(axes) if x == role]
    rows = np.prod([shape[k] for k, x in enumerate(axes) if x == "b"], dtype=int)
    n_in = np.prod([shape[k] for k, x in enumerate(axes) if x == "i"], dtype=int)
    matrices = np.transpose(w, order).reshape(rows, n_in, -1)
    want = [decode(encode(jnp.asarray(x), scheme, block=block)) for x in matrices]
    back = np.stack(want).reshape([shape[k] for k in order])
    got = np.transpose(decode(leaf), order)
    # The mean of scales is a sum whose order depends on the shape.
    np.testing.assert_allclose(got, back, rtol=1e-6, atol=1e-6)


@every_scheme
def test_rounds_once_to_its_dtype(scheme):
    w = normal(128, 64)
    leaf = encode(w, scheme, dtype=jnp.bfloat16)
    assert leaf.dtype == decode(leaf).dtype == jnp.bfloat16 and numbers(leaf).dtype == jnp.float32
    wide = decode(encode(w, scheme)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(decode(leaf), wide)


@every_scheme
def test_zeros_stay_zeros(scheme):
    leaf = encode(jnp.zeros((128, 3)), scheme)
    np.testing.assert_array_equal(decode(leaf), np.zeros((128, 3)))


@every_scheme
def test_is_a_tree_like_any_other(scheme):
    w = normal(3, 128, 8)
    leaf = encode(w, scheme, "bio")
    values, tree = jax.tree.flatten(leaf)
    assert len(values) == len(parts(leaf)) and all(x.shape[0] == 3 for x in values)
    assert all(x.dtype in (jnp.uint8, jnp.int8, jnp.float32) for x in values)
    np.testing.assert_array_equal(decode(tree.unflatten(values)), decode(leaf))
    keys = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(leaf)[0]]
    assert keys == [f".{name}" for name in parts(leaf)]
    shapes = jax.eval_shape(lambda x: x, leaf)
    assert shapes.shape == w.shape and abstract(shapes) == jax.ShapeDtypeStruct(w.shape, w.dtype)
    assert paths.named_leaves({"a": {"kernel": leaf}}) == {"a/kernel": leaf}
    # Labels, specs and the like stand in the places of the parts.
    assert is_quantized(jax.tree.map(lambda x: "frozen", leaf))


@pytest.mark.parametrize("scheme", slow.after(2, SCHEMES))
def test_loops_and_maps_take_one_kernel_at_a_time(scheme):
    w = normal(3, 128, 8)
    leaf, want = encode(w, scheme, "bio"), decode(encode(w, scheme, "bio"))
    _, scanned = jax.lax.scan(lambda c, x: (c, decode(x)), 0, leaf)
    np.testing.assert_array_equal(scanned, want)
    np.testing.assert_array_equal(jax.vmap(decode)(leaf), want)
    one = jax.tree.map(lambda x: x[1], leaf)
    assert one.shape == (128, 8) and one.roles == "io"
    np.testing.assert_array_equal(decode(one), want[1])
    two = jax.tree.map(lambda *x: jnp.stack(x), leaf, leaf)
    assert two.shape == (2, 3, 128, 8)
    np.testing.assert_array_equal(decode(two)[1], want)


def test_no_gradient_reaches_what_is_stored():
    leaf = encode(normal(64, 4), "nf4")
    grads = jax.grad(lambda leaf: decode(leaf).sum(), allow_int=True)(leaf)
    assert grads.codes.dtype == jax.dtypes.float0 and not np.any(grads.scales)


@pytest.mark.parametrize("scheme", ["nf4_double", "int4", "float8_e4m3_blocks"])
def test_orbax_saves_and_restores(scheme, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tree = {"layer": {"kernel": encode(normal(2, 128, 8), scheme, "bio"), "bias": jnp.ones(8)}}
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "x", tree)
        saver.wait_until_finished()
        back = saver.restore(tmp_path / "x", jax.eval_shape(lambda x: x, tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


# ---- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, x, says",
    [
        (dict(scheme="nf5"), normal(64, 2), r"no scheme 'nf5'.*'nf4'"),
        (dict(scheme="nf4"), jnp.ones((64, 2), jnp.int32), "holds int32"),
        (dict(scheme="nf4"), normal(8, 4), "has 32 numbers, fewer than a block of 'nf4', 64"),
        (dict(scheme="int4"), normal(72, 4), "72 inputs, which blocks of 64 do not divide"),
        (dict(scheme="nf4", axes="bio"), normal(64, 2), "'bio' are no roles"),
        (dict(scheme="nf4", axes="oo"), normal(64, 2), "'oo' are no roles"),
        (dict(scheme="nf4", block=63), normal(64, 2), "block=63"),
        (dict(scheme="int8", block=64), normal(64, 2), "block=64.*no blocks of inputs"),
        *[
            (dict(scheme=s), normal(128, 4).at[5, 1].set(bad), "NaN or infinity")
            for s in SCHEMES
            for bad in (np.nan, np.inf)
        ],
    ],
)
def test_bad_input(options, x, says):
    with pytest.raises(ValueError, match=says):
        encode(x, **options)


def test_base_class_says_nothing_of_numbers():
    whole = dict(codes=jnp.zeros((2, 2)), scales=jnp.zeros(()), axes="io", sizes=(2, 2))
    with pytest.raises(NotImplementedError):
        Quantized(**whole, dtype=np.dtype("float32")).matrix()
