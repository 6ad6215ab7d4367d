"""Attention by cuDNN: its lowering for an NVIDIA GPU, and where there is one, what it computes.

Needs nothing but jax, numpy and pytest besides the library: it runs on a bare GPU machine, by
``python -m pytest -m gpu tests/models/test_cudnn_attention.py``.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import attention_mask, cudnn_attention, plain_attention


def make_half(n, groups=4):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (4, groups, groups)
    return [
        jax.random.normal(k, (2, n, h, 16), jnp.bfloat16) for k, h in zip(keys, heads, strict=True)
    ]


TEXTS = jnp.array([[0] * 7 + [1] * 9, [3] * 5 + [1] * 6 + [2] * 5])
PADDED = np.arange(16) < np.array([[16], [9]])
FUSED = {
    "padding": (attention_mask.make_padding_mask(jnp.array(PADDED)), 4),
    "causal": (attention_mask.make_causal_mask(jnp.array(PADDED), jnp.arange(16)), 2),
    "window": (attention_mask.make_causal_mask(jnp.array(PADDED), jnp.arange(16), window=5), 4),
    "left": (attention_mask.make_causal_mask(jnp.array(PADDED[:, ::-1]), jnp.arange(16)), 4),
    "segments": (
        attention_mask.make_causal_mask(jnp.array(PADDED), jnp.arange(16), segments=TEXTS),
        2,
    ),
    "segments and a window": (
        attention_mask.make_causal_mask(
            jnp.array(PADDED), jnp.arange(16), segments=TEXTS, window=3
        ),
        4,
    ),
    "window of some layers": (
        attention_mask.make_causal_mask(
            jnp.array(PADDED), jnp.arange(16), window=5, is_windowed=jnp.array(True)
        ),
        4,
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_cudnn_lowers_for_a_gpu(name, monkeypatch):
    """The program for a GPU has cuDNN's calls of both passes, and none that writes scores."""
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 90800)
    mask, groups = FUSED[name]
    loss = lambda *x: cudnn_attention.attend(*x, mask, scale=0.25).astype(jnp.float32).sum()
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*make_half(16, groups))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    count = 2 if name == "window of some layers" else 1
    bias = "ScaleBias" if "segments" in name else ""
    for call in (f"__cudnn$fmha{bias}Softmax(", f"__cudnn$fmha{bias}SoftmaxBackward("):
        assert text.count(call) == count, call
    window = re.search(r"sliding_window_length\W*(22)?\W*5\b", text)
    assert (window is not None) == name.startswith("window")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUSED)
def test_cudnn_computes_the_same(name):
    mask, groups = FUSED[name]
    *arrays, cotangent = [*make_half(16, groups), make_half(16)[0]]
    cotangent = jnp.where(mask.keys.is_token[..., None, None], cotangent, 0)

    def differentiate(attend, seen, dtype):
        fn = lambda *x: attend(*x, seen, scale=0.25)
        y, pull = jax.vjp(fn, *(x.astype(dtype) for x in arrays))
        counted = jnp.where(mask.keys.is_token[..., None, None], y, 0)
        return [np.asarray(x, np.float32) for x in (counted, *pull(cotangent.astype(dtype)))]

    found = differentiate(cudnn_attention.attend, mask, jnp.bfloat16)
    bias = attention_mask.make_bias(mask)
    with jax.default_matmul_precision("highest"):
        expected = differentiate(plain_attention.attend, bias, jnp.float32)
    for x, y in zip(found, expected, strict=True):
        assert np.linalg.norm(x - y) < 0.01 * np.linalg.norm(y)
