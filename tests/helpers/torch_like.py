"""Plain functions that compute what torch models compute, with their tables of names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import lax

from lora_jax import names, paths
from lora_jax.models import bert
from lora_jax.names import Name


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    scale, bias = (jnp.broadcast_to(p[k], x.shape) for k in ("scale", "bias"))
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def dense(p, x):
    y = x @ p["kernel"]
    return y + jnp.broadcast_to(p["bias"], y.shape)


def block(p, x, heads=2):
    """One layer of GPT-2."""
    b, n, d = x.shape
    qkv = dense(p["attn"]["c_attn"], norm(p["ln_1"], x)).reshape(b, n, 3, heads, d // heads)
    q, k, v = (qkv[:, :, i] for i in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(d / heads)
    scores = jnp.where(jnp.broadcast_to(np.tri(n, dtype=bool), scores.shape), scores, -1e30)
    y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(b, n, d)
    x = x + dense(p["attn"]["c_proj"], y)
    return x + dense(p["mlp"]["c_proj"], jax.nn.gelu(dense(p["mlp"]["c_fc"], norm(p["ln_2"], x))))


def gpt2(params, ids, mask=None):
    """GPT-2's logits; the layers are ``h_0``, ... or stacked in ``h``; the head may be tied."""
    x = params["wte"]["embedding"][ids]
    x = x + jnp.broadcast_to(params["wpe"]["embedding"][: ids.shape[1]], x.shape)
    if "h" in params:
        x = lax.scan(lambda x, p: (block(p, x), None), x, params["h"])[0]
    else:
        for k in range(sum(name.startswith("h_") for name in params)):
            x = block(params[f"h_{k}"], x)
    x = norm(params["ln_f"], x)
    if "lm_head" in params:
        return x @ params["lm_head"]["kernel"]
    return x @ params["wte"]["embedding"].T


def gpt2_names(layers=2, *, stacked=False, tied=True):
    prefix = "transformer."
    head = ("lm_head.weight",) if tied else ()
    rows = [
        Name("wte/embedding", f"{prefix}wte.weight", tied=head),
        Name("wpe/embedding", f"{prefix}wpe.weight"),
        Name("ln_f/scale", f"{prefix}ln_f.weight"),
        Name("ln_f/bias", f"{prefix}ln_f.bias"),
    ]
    if not tied:
        rows.append(Name("lm_head/kernel", "lm_head.weight", transpose=True))
    for flax, number in [("h", "{}")] if stacked else [(f"h_{k}", k) for k in range(layers)]:
        for part in ("ln_1", "ln_2", "attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"):
            hf = f"{prefix}h.{number}.{part.replace('/', '.')}"
            weight = "scale" if part.startswith("ln") else "kernel"
            rows += [Name(f"{flax}/{part}/{weight}", f"{hf}.weight")]
            rows += [Name(f"{flax}/{part}/bias", f"{hf}.bias")]
    return rows


def conv(params, ids, mask=None):
    """The convolutional net of scripts/make_peft_goldens.py."""
    same = lambda p, y: y + jnp.broadcast_to(p["bias"], y.shape)
    x = params["table"]["embedding"][ids]
    one = lax.conv_general_dilated(
        x, params["line"]["kernel"], (1,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC")
    )
    x = jnp.tanh(same(params["line"], one)).swapaxes(1, 2)[..., None]
    spec = dict(padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    two = lax.conv_general_dilated(x, params["conv"]["kernel"], (2, 2), **spec)
    x = jnp.tanh(same(params["conv"], two))
    x = lax.conv_general_dilated(x, params["pointwise"]["kernel"], (1, 1), **spec)
    return dense(params["linear"], same(params["pointwise"], x).mean((1, 2)))


def conv_names():
    rows = [Name("table/embedding", "table.weight")]
    rows += [Name("linear/kernel", "linear.weight", transpose=True)]
    for part in ("line", "conv", "pointwise"):
        rows += [Name(f"{part}/kernel", f"{part}.weight", kind="conv")]
    return rows + [Name(f"{p}/bias", f"{p}.bias") for p in ("linear", "line", "conv", "pointwise")]


def bert_model(directory):
    config = json.loads((directory / "config.json").read_text())
    built = bert.BertConfig.from_hf(config)
    model = bert.BertForSequenceClassification(built, num_labels=3)
    fn = lambda params, ids, mask: model.apply({"params": params}, ids, mask)
    return fn, bert.names(built)


def load(file, table):
    """Parameters from a safetensors file, by the table; stacked rows take all their layers."""
    tensors = safetensors.numpy.load_file(file)
    leaves = {}
    for row in table:
        if "{}" in row.hf:
            layers = [tensors[row.hf.replace("{}", str(k))] for k in range(2)]
            leaves[row.flax] = np.stack([_leaf(row, x) for x in layers])
        else:
            source = row.hf if row.hf in tensors else "transformer.wte.weight"  # GPT-2's tied head
            leaves[row.flax] = _leaf(row, tensors[source])
    return jax.tree.map(jnp.asarray, paths.nest(leaves))


def _leaf(row, x):
    """Written out here, apart from lora_jax.names."""
    if row.kind == names.CONV:
        return np.moveaxis(x, (0, 1), (-1, -2))
    return x.T if row.transpose else x
