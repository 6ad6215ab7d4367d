"""Runs the cases of test_devices.py on 4 virtual devices, in a process of its own.

    python tests/helpers/cases_on_4_devices.py [toy | dora | offset | vera | adalora | lora_fa] [few]

With "few" there are some cases alone, for what the other methods have in parts.

prints a JSON object: for each case how far `lift` is from `merge`, in values and in gradients.
"""

import json
import os
import sys

from tests.helpers import xla_flags

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {xla_flags.make_flags()}"

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import sharding
from lora_jax.lowrank import LowRank
from tests.helpers import toy_method

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
METHOD = next((x for x in ("dora", "vera", "adalora") if x in sys.argv), "lora")
INIT = "pissa" if "offset" in sys.argv else "uniform"
FIELDS = {"rank": 2, "method": METHOD, "init": INIT, "train_a": "lora_fa" not in sys.argv}
CONFIG = lora.LoRAConfig(**FIELDS)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape) / 2, jnp.float32)


def stirred(adapter):
    """Nothing that trains is zero; with the argument "toy", kernels have a gain as well."""
    rng = np.random.default_rng(0)
    if "toy" in sys.argv:
        is_plain = lambda x: isinstance(x, LowRank)
        change = lambda x: toy_method.make_like(x) if is_plain(x) else x
        adapter = jax.tree.map(change, adapter, is_leaf=is_plain)
        adapter = jax.tree.map(lambda x: x / 3, adapter)  # as small as plain LoRA's
    new = lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(lambda x, trains: new(x) if trains else x, adapter, lora.mask(adapter))


def gap(got, want):
    """The largest difference, relative to the largest entry of each leaf."""
    far = lambda x, y: float(np.abs(x - y).max() / (1e-3 + np.abs(y).max()))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(far(np.asarray(x), np.asarray(y)) for x, y in pairs)


total = lambda f: lambda *args: jnp.sum(jnp.sin(f(*args)))


# ---- shard_map -----------------------------------------------------------------------------------

AUTO = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
PARAMS, X = {"w": array(8, 16), "o": array(16, 8)}, array(8, 8)
REPLICATED = {
    "products": lambda p, x: jnp.tanh(x @ p["w"]) @ p["o"],
    "scan": lambda p, x: lax.scan(
        lambda c, _: (jnp.tanh(c @ p["w"] @ p["o"]), c), x, None, length=3
    )[0],
    "while": lambda p, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"] @ p["o"])), (0, x)
    )[1],
    "remat": lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["w"], x) @ p["o"],
    "jit": lambda p, x: jax.jit(lambda w, x: jnp.tanh(x @ w))(p["w"], x) @ p["o"],
    "relu": lambda p, x: jax.nn.relu(x @ p["w"]) @ p["o"],
}
BRANCH = lambda p, x: lax.cond(x[0, 0] > 0, lambda x: x @ p["w"] @ p["o"], lambda x: x, x)
SPLIT = {
    "columns and rows": (
        lambda w, o, x: lax.psum(jnp.tanh(x @ w) @ o, "data"),
        (P(None, "data"), P("data", None), P()),
        P(),
    ),
    "gathered": (
        lambda w, o, x: (
            jnp.tanh(x @ lax.all_gather(w, "data", axis=1, tiled=True))
            @ lax.all_gather(o, "data", axis=0, tiled=True)
        ),
        (P(None, "data"), P("data", None), P("data")),
        P("data"),
    ),
    "gathered, and split anew": (
        lambda w, o, x: (
            jnp.tanh(x @ lax.all_gather(w, "data", axis=0, tiled=False).reshape(8, 16))
            @ lax.all_gather(o, "data", axis=0, tiled=True)
        ),
        (P("data", None), P("data", None), P("data")),
        P("data"),
    ),
}


def shard_map_outside(fn, check_vma):
    """The lifted function in a `shard_map`, base and adapter replicated, rows split."""
    adapter = stirred(lora.init(KEY, fn, PARAMS, CONFIG, X))
    specs = (P(), P(), P("data"))
    split = jax.shard_map(
        lambda p, a, x: lora.lift(fn, strict=True)(lora.bind(p, a), x),
        mesh=AUTO, in_specs=specs, out_specs=P("data"), check_vma=check_vma,
    )  # fmt: skip
    dropped = jax.shard_map(
        lambda p, a, x, k: lora.lift(fn, dropout=0.3, dropout_key=k)(lora.bind(p, a), x),
        mesh=AUTO, in_specs=(*specs, P()), out_specs=P("data"), check_vma=check_vma,
    )  # fmt: skip
    assert np.isfinite(np.asarray(jax.jit(dropped)(PARAMS, adapter, X, KEY))).all()
    merged = lambda a: fn(lora.merge(PARAMS, a), X)
    return compare(lambda a: split(PARAMS, a, X), merged, adapter, "while" in str(fn.__name__))


def compare(lifted, merged, adapter, no_gradient=False):
    found = {"value": gap(jax.jit(lifted)(adapter), jax.jit(merged)(adapter))}
    if not no_gradient:
        got, want = (jax.jit(jax.grad(total(f)))(adapter) for f in (lifted, merged))
        found["gradient"] = gap(got, want)
    return found


def shard_map_inside(fn, params, x):
    adapter = stirred(lora.init(KEY, fn, params, CONFIG, x))
    lifted = lambda a: lora.lift(fn, strict=True)(lora.bind(params, a), x)
    drop = lambda a, k: lora.lift(fn, dropout=0.3, dropout_key=k)(lora.bind(params, a), x)
    assert np.isfinite(np.asarray(jax.jit(drop)(adapter, KEY))).all()
    return compare(lifted, lambda a: fn(lora.merge(params, a), x), adapter)


def one_adapter_each(fn):
    """The adapter varies over the devices; the inputs and the base do not."""
    adapters = [stirred(lora.init(k, fn, PARAMS, CONFIG, X)) for k in jax.random.split(KEY, 4)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *adapters)
    run = jax.shard_map(
        lambda p, a, x: lora.lift(fn)(lora.bind(p, jax.tree.map(lambda y: y[0], a)), x)[None],
        mesh=AUTO, in_specs=(P(), P("data"), P()), out_specs=P("data"),
    )  # fmt: skip
    want = jnp.stack([fn(lora.merge(PARAMS, a), X) for a in adapters])
    return {"value": gap(jax.jit(run)(PARAMS, stacked, X), want)}


def masks_differ_by_device():
    """Dropout in a `shard_map`: rows that lie on different devices have masks of their own."""
    fn, x = lambda p, x: x @ p["w"], jnp.ones((4, 64))
    params = {"w": jnp.zeros((64, 16))}
    adapter = stirred(lora.init(KEY, fn, params, CONFIG, x))
    run = jax.shard_map(
        lambda a, x, k: lora.lift(fn, dropout=0.5, dropout_key=k)(lora.bind(params, a), x),
        mesh=AUTO, in_specs=(P(), P("data"), P()), out_specs=P("data"),
    )  # fmt: skip
    rows = np.asarray(jax.jit(run)(adapter, x, KEY))
    return {"value": float(len(np.unique(rows.round(4), axis=0)) != 4)}


# ---- Explicit shardings --------------------------------------------------------------------------

MESH = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)


def is_on_mesh():
    return bool(jax.sharding.get_abstract_mesh().shape)


def out(*spec):
    return {"out_sharding": P(*spec)} if is_on_mesh() else {}


def reshard(x, *spec):
    return jax.sharding.reshard(x, P(*spec)) if is_on_mesh() else x


def look_up(table, ids):
    rows = P("data", None, None)
    return table.at[ids].get(out_sharding=rows) if is_on_mesh() else table[ids]


IDS = jnp.tile(jnp.arange(3)[None], (4, 1))
# name: (function, specs of the parameters, spec of the input, shapes of the parameters, input)
EXPLICIT = {
    "sequence split": (
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["o"],
        {"w": P(), "o": P()}, P("data", "tensor"), {"w": (8, 16), "o": (16, 8)}, array(4, 6, 8),
    ),
    "columns": (lambda p, x: x @ p["w"], {"w": P(None, "tensor")}, P("data"), {"w": (8, 16)}, array(4, 6, 8)),
    "columns and rows": (
        lambda p, x: jnp.einsum("bsf,fo->bso", jnp.tanh(x @ p["w"]), p["o"], **out("data")),
        {"w": P(None, "tensor"), "o": P("tensor", None)}, P("data"), {"w": (8, 16), "o": (16, 8)}, array(4, 6, 8),
    ),
    "heads": (
        lambda p, x: jnp.einsum(
            "bshk,hko->bso",
            jnp.einsum("bsd,dhk->bshk", x, p["w"], **out("data", None, "tensor", None)),
            p["o"], **out("data"),
        ),
        {"w": P(None, "tensor", None), "o": P("tensor", None, None)}, P("data"),
        {"w": (8, 4, 4), "o": (4, 4, 8)}, array(4, 6, 8),
    ),
    "heads by a reshape": (
        lambda p, x: jnp.einsum(
            "bsd,dhk->bshk", x, p["w"].reshape(8, 4, 4, **out(None, "tensor", None)),
            **out("data", None, "tensor", None),
        ),
        {"w": P(None, "tensor")}, P("data"), {"w": (8, 16)}, array(4, 6, 8),
    ),
    "gathered": (
        lambda p, x: x @ reshard(p["w"]), {"w": P("data", "tensor")}, P("data"), {"w": (8, 16)}, array(4, 6, 8),
    ),
    "split anew": (
        lambda p, x: x @ reshard(p["w"], None, "tensor"), {"w": P(None, "data")}, P("data"), {"w": (8, 16)}, array(4, 6, 8),
    ),
    "sum over a split axis": (
        lambda p, x: jnp.einsum("bd,do->bo", x, p["w"], **out("data", None)),
        {"w": P("tensor", None)}, P("data", "tensor"), {"w": (8, 16)}, array(4, 8),
    ),
    "embedding and tied head": (
        lambda p, i: jnp.einsum("bsd,vd->bsv", jnp.tanh(look_up(p["e"], i)), p["e"], **out("data", None, None)),
        {"e": P("tensor", None)}, P("data"), {"e": (10, 8)}, IDS,
    ),
    "scanned layers": (
        lambda p, x: lax.scan(
            lambda c, w: (jnp.tanh(jnp.einsum("bd,do->bo", c, w, **out("data", None))), None), x, p["w"]
        )[0],
        {"w": P(None, None, "tensor")}, P("data"), {"w": (3, 8, 8)}, array(4, 8),
    ),
    "remat and jit": (
        lambda p, x: jax.checkpoint(lambda w, x: jax.jit(
            lambda w, x: jnp.tanh(jnp.einsum("bd,do->bo", x, w, **out("data", "tensor"))))(w, x))(p["w"], x),
        {"w": P(None, "tensor")}, P("data"), {"w": (8, 8)}, array(4, 8),
    ),
    "experts": (
        lambda p, x: jnp.einsum("ebd,edo->ebo", x, p["w"], **out("tensor", "data", None)),
        {"w": P("tensor", None, None)}, P("tensor", "data"), {"w": (4, 8, 6)}, array(4, 4, 8),
    ),
    "side by side": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["o"]], 1), {"w": P(), "o": P()}, P("data"),
        {"w": (8, 16), "o": (8, 4)}, array(4, 8),
    ),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        {"w": P()}, P("data"), {"w": (3, 3, 4, 8)}, array(4, 5, 5, 4),
    ),
}  # fmt: skip


def explicit(fn, specs, x_spec, shapes, x):
    """`lift` and `merge` on a mesh with explicit axes, the factors placed by `adapter_specs`."""
    put = lambda y, spec: jax.device_put(y, NamedSharding(MESH, spec))
    params = {name: array(*shape) for name, shape in shapes.items()}
    config = lora.LoRAConfig(targets=tuple(params), **FIELDS)
    adapter = stirred(lora.init(KEY, fn, params, config, x))
    with jax.set_mesh(MESH):
        base, x = {name: put(w, specs[name]) for name, w in params.items()}, put(x, x_spec)
        adapter = lora.sharding.place(adapter, lora.sharding.adapter_specs(specs, adapter), MESH)
        lifted = lambda a: lora.lift(fn, strict=True)(lora.bind(base, a), x)
        merged = lambda a: fn(lora.merge(base, a), x)
        types = [jax.typeof(jax.jit(f)(adapter)) for f in (lifted, merged)]
        assert types[0] == types[1], types
        drop = lambda a, k: lora.lift(fn, dropout=0.2, dropout_key=k)(lora.bind(base, a), x)
        assert np.isfinite(np.asarray(jax.jit(drop)(adapter, KEY))).all()
        return {**compare(lifted, merged, adapter), "eager": gap(lifted(adapter), merged(adapter))}


# ---- Trained tokens ------------------------------------------------------------------------------


def trained_tokens(kind):
    """A table and a head whose tokens are split over devices."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    specs = {"table": P("tensor", "fsdp"), "head": P("fsdp", "tensor")}
    base, ids = {"table": array(16, 8), "head": array(8, 16)}, jnp.array([[0, 3, 9], [2, 10, 1]])
    config = lora.LoRAConfig(targets=(), train_tokens={"table": (9, 2, 3), "head": (1, 5)})
    plain = lambda p, ids: jnp.tanh(p["table"][ids]) @ p["head"]
    adapter = stirred(lora.init(KEY, plain, base, config, ids))
    want = jax.grad(total(lambda a: plain(lora.merge(base, a), ids)))(adapter)

    def fn(p, ids):
        x = jnp.tanh(p["table"].at[ids].get(out_sharding=P()))
        return jnp.einsum("bti,io->bto", x, p["head"], out_sharding=P())

    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        split = jax.tree.map(put, base, specs)
        placed = jax.tree.map(put, adapter, sharding.adapter_specs(specs, adapter))
        used = fn if kind == AxisType.Explicit else plain
        run = lambda a, p: lora.lift(used, strict=True)(lora.bind(p, a), put(ids, P()))
        got = jax.jit(run)(placed, split)
        grads = jax.jit(jax.grad(total(run)))(placed, split)
    return {"value": gap(got, plain(lora.merge(base, adapter), ids)), "gradient": gap(grads, want)}


FEW = ("columns and rows", "embedding and tied head", "scanned layers", "convolution")


def main_few():
    in_specs, out_specs = SPLIT["columns and rows"][1:]
    split = jax.shard_map(
        SPLIT["columns and rows"][0], mesh=AUTO, in_specs=in_specs, out_specs=out_specs
    )
    call = lambda p, x: split(p["w"], p["o"], x)
    found = {"shard_map in lift": shard_map_inside(call, PARAMS, X)}
    found["lift in shard_map"] = shard_map_outside(REPLICATED["remat"], True)
    print(json.dumps(found | {f"explicit, {name}": explicit(*EXPLICIT[name]) for name in FEW}))


def main():
    found = {"masks": masks_differ_by_device()}
    for name, fn in REPLICATED.items():
        fn.__name__ = name
        for vma in (True, False):
            found[f"lift in shard_map, {name}, check_vma={vma}"] = shard_map_outside(fn, vma)
        inside = lambda p, x, fn=fn: jax.shard_map(
            fn, mesh=AUTO, in_specs=(P(), P("data")), out_specs=P("data")
        )(p, x)
        if name != "while":  # it has no gradient
            found[f"shard_map in lift, {name}"] = shard_map_inside(inside, PARAMS, X)
        found[f"an adapter for each device, {name}"] = one_adapter_each(fn)
    found["an adapter for each device, branch"] = one_adapter_each(BRANCH)
    for name, (fn, in_specs, out_specs) in SPLIT.items():
        split = jax.shard_map(fn, mesh=AUTO, in_specs=in_specs, out_specs=out_specs)
        call = lambda p, x, split=split: split(p["w"], p["o"], x)
        found[f"shard_map in lift, {name}"] = shard_map_inside(call, PARAMS, X)
    for name, case in EXPLICIT.items():
        found[f"explicit, {name}"] = explicit(*case)
    for kind in (AxisType.Auto, AxisType.Explicit):
        found[f"trained tokens, {kind.name}"] = trained_tokens(kind)
    print(json.dumps(found))


if __name__ == "__main__":
    main_few() if "few" in sys.argv else main()
