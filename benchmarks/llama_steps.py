"""One training step of a Llama with LoRA on every linear layer: by this library, and by PEFT.

Both sides have the same shapes and rules: random weights and tokens, rank 16, the gradient clipped,
AdamW; the frozen base is stored in bfloat16 or 4 bits, what is trained is float32. Nothing here
needs more than jax, flax and optax, and for PEFT's side torch, transformers, peft, and for its 4
bits bitsandbytes.
"""

import dataclasses
import functools
import math
import statistics
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax.models import llama
from lora_jax.models.llama_config import LlamaConfig
from lora_jax.models.token_losses import compute_token_losses

PyTree = Any
RANK, ALPHA, RATE, CLIP, NF4 = 16, 32.0, 2e-4, 1.0, "nf4_double"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Shapes of Llama 3.2 1B and 3B, and of Llama 3.1 8B.
_LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0,
            "max_position_embeddings": 131072}  # fmt: skip
SHAPES = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "head_dim": 16,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "1b": {**_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
           "num_hidden_layers": 16, "num_attention_heads": 32, "tie_word_embeddings": True},
    "3b": {**_LLAMA_3, "hidden_size": 3072, "intermediate_size": 8192, "head_dim": 128,
           "num_hidden_layers": 28, "num_attention_heads": 24, "tie_word_embeddings": True},
    "8b": {**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128,
           "num_hidden_layers": 32, "num_attention_heads": 32},
}  # fmt: skip
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L4": 121.0}  # TFLOP/s, dense bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What a side is given.

    Attributes:
      model: name of a shape in :data:`SHAPES`.
      batch: rows and tokens of a row.
      base: dtype in which the frozen kernels are stored, "bfloat16" or "nf4".
      remat: whether the backward pass computes each layer again.
      texts: number of texts in a row, which do not see each other.
    """

    model: str
    batch: tuple[int, int]
    base: str = "bfloat16"
    remat: bool = True
    texts: int = 1


def example(case: Case) -> dict[str, np.ndarray]:
    """Makes rows of random tokens, each of several texts of one length."""
    rows, length = case.batch
    rng, part = np.random.default_rng(0), length // case.texts
    ids = rng.integers(1, SHAPES[case.model]["vocab_size"], case.batch)
    places = np.broadcast_to(np.arange(length), (rows, length))
    batch = {"input_ids": ids, "positions": places % part}
    if case.texts > 1:
        batch["segment_ids"] = places // part
    return {name: x.astype(np.int32) for name, x in batch.items()}


def read_config(case: Case) -> LlamaConfig:
    """Reads the model's shape, whose words are those of Hugging Face's ``config.json``."""
    return LlamaConfig.from_hf({"model_type": "llama", **SHAPES[case.model]})


# ---- This library's side -----------------------------------------------------------------------


def abstract_base(model: llama.LlamaForCausalLM, case: Case) -> PyTree:
    """Returns the base as shapes and dtypes, its kernels quantized if the case says so."""
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    base = jax.eval_shape(model.init, jax.random.key(0), ids)
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), base)
    if case.base == "bfloat16":
        return base
    table = lora.tabulate(model.apply, base, lora.LoRAConfig(targets=TARGETS), ids)
    return lora.quantize(base, NF4, like=table)


def draw(shapes: PyTree) -> PyTree:
    """Draws random weights of these shapes; codes are random bytes, scales of norms are 1."""

    def leaf(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        key = jax.random.key(zlib.crc32(jax.tree_util.keystr(path).encode()))
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jax.random.bits(key, x.shape, x.dtype)
        if "norm" in jax.tree_util.keystr(path):
            return jnp.ones(x.shape, x.dtype)
        return 0.02 * jax.random.normal(key, x.shape, x.dtype)

    return jax.jit(lambda: jax.tree_util.tree_map_with_path(leaf, shapes))()


def next_token_loss(model: llama.LlamaForCausalLM, params: PyTree, batch: dict) -> jax.Array:
    """Computes the mean loss of the tokens that have one before them in their text."""
    hidden, _ = model.apply(params, **batch, method="compute_hidden")
    head = functools.partial(model.apply, params, method="compute_logits")
    labels = jnp.roll(batch["input_ids"], -1, axis=1)
    is_counted = jnp.roll(batch["positions"], -1, axis=1) > 0
    losses = compute_token_losses(head, hidden, labels, is_counted)
    return losses.loss.sum() / is_counted.sum()


def make_step(model: llama.LlamaForCausalLM) -> Callable:
    """Makes ``(adapter, moments, base, batch) -> (adapter, moments, loss)``."""
    rule = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(RATE))

    def step(adapter: PyTree, moments: PyTree, base: PyTree, batch: dict) -> tuple:
        def loss(adapter: PyTree) -> jax.Array:
            fn = functools.partial(next_token_loss, model)
            return lora.lift(fn)(lora.bind(base, adapter), batch)

        value, gradient = jax.value_and_grad(loss)(adapter)
        updates, moments = optimizer(adapter).update(gradient, moments, adapter)
        return optax.apply_updates(adapter, updates), moments, value

    def optimizer(adapter: PyTree) -> optax.GradientTransformation:
        return optax.masked(rule, lora.mask(adapter))

    step.init = lambda adapter: optimizer(adapter).init(adapter)
    return step


def lower(case: Case, *, abstract: bool) -> tuple[jax.stages.Lowered, tuple]:
    """Traces the step; returns its arguments, too."""
    config = read_config(case)
    remat = "full" if case.remat else "none"
    model = llama.LlamaForCausalLM(config, dtype=jnp.bfloat16, scan_layers=True, remat=remat)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    settings = lora.LoRAConfig(rank=RANK, alpha=ALPHA, targets=TARGETS)
    step, base = make_step(model), abstract_base(model, case)
    start = lambda base: lora.init(jax.random.key(0), model.apply, base, settings, ids)
    batch = example(case)
    if abstract:
        adapter = jax.eval_shape(start, base)
        moments = jax.eval_shape(step.init, adapter)
    else:
        base = draw(base)
        adapter = jax.jit(start)(base)
        moments = step.init(adapter)
        batch = jax.device_put(batch)
    args = adapter, moments, base, batch
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args), args


def count_kernels(config: LlamaConfig) -> int:
    """Counts the parameters that a token is multiplied with: kernels and the head, tied or not."""
    heads = config.num_attention_heads + config.num_key_value_heads
    attention = 2 * config.hidden_size * config.head_dim * heads
    mlp = 3 * config.hidden_size * config.intermediate_size
    head = config.hidden_size * config.vocab_size
    return config.num_hidden_layers * (attention + mlp) + head


def compile_step(
    lowered: jax.stages.Lowered, options: dict[str, str] | None = None
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """Compiles the step; returns XLA's count of its memory, too, in GB."""
    begin = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    about = {"compile_s": round(time.perf_counter() - begin, 1)}
    if (m := compiled.memory_analysis()) is not None:
        held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        sizes = {"argument_gb": held, "temporary_gb": m.temp_size_in_bytes}
        about |= {name: round(n / 1e9, 3) for name, n in sizes.items()}
        about["total_gb"] = round((held + m.temp_size_in_bytes) / 1e9, 3)
    return compiled, about


def measure_memory(case: Case) -> dict[str, float]:
    """Compiles the step for weights that are not there; returns XLA's count of its memory, in GB.

    On a CPU float32 copies of whole arrays are left out, which an accelerator does not need.
    """
    lowered, _ = lower(case, abstract=True)
    kernels = count_kernels(read_config(case))
    own = compile_step(lowered)[1]
    if jax.default_backend() != "cpu":
        return own | {"kernels": kernels}
    found = compile_step(lowered, {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"})[1]
    return found | {"own_temporary_gb": own["temporary_gb"], "kernels": kernels}


def ours(case: Case, steps: int) -> dict[str, Any]:
    """Measures this library's step."""
    lowered, (adapter, moments, base, batch) = lower(case, abstract=False)
    compiled, about = compile_step(lowered)
    losses, seconds = [], []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        adapter, moments, loss = compiled(adapter, moments, base, batch)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - begin)
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        about["peak_gb"] = round(stats["peak_bytes_in_use"] / 1e9, 3)
    device = jax.devices()[0].device_kind
    return about | {"loss": losses[0]} | speed(case, seconds[2:], device)


def speed(case: Case, seconds: list[float], device: str) -> dict[str, float | str]:
    """Computes tokens and FLOPs a second of the median step."""
    kernels = count_kernels(read_config(case))
    median, tokens = statistics.median(seconds), math.prod(case.batch)
    flops = (6 if case.remat else 4) * kernels * tokens
    peak = peak_tflops(device)
    return {
        "device": device,
        "kernels": kernels,
        "step_s": round(median, 4),
        "tokens_per_s": round(tokens / median, 1),
        "tflops": round(flops / median / 1e12, 4),
        "peak_tflops": round(peak, 4),
        "mfu": round(flops / median / 1e12 / peak, 4),
    }


def peak_tflops(device: str) -> float:
    """Returns what a device can do: the maker's figure, or what one large product reaches."""
    known = [peak for name, peak in PEAKS.items() if name in device]
    if known:
        return known[0]
    x = jax.random.normal(jax.random.key(0), (2048, 2048)).astype(jnp.bfloat16)
    multiply, times = jax.jit(lambda x: x @ x), []
    for _ in range(6):
        begin = time.perf_counter()
        multiply(x).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(times[1:]) / 1e12


# ---- PEFT's side -------------------------------------------------------------------------------


def theirs(case: Case, steps: int, *, is_compiled: bool) -> dict[str, Any]:
    """Measures the step of PEFT on transformers' model, with PyTorch's fused attention."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = peft_model(case, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    update = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    batch = {name: torch.from_numpy(x).long().to(device) for name, x in example(case).items()}
    ids = batch["input_ids"]
    labels = torch.where(batch["positions"] == 0, -100, ids)  # the first of a text has no context
    forward = torch.compile(model, dynamic=False) if is_compiled else model
    seconds, losses = [], []
    for _ in range(steps + 3):
        begin = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            positions = batch["positions"] if case.texts > 1 else None
            loss = forward(input_ids=ids, position_ids=positions, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        update.step()
        update.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    about, name = {"compile_s": round(sum(seconds[:3]), 1), "loss": losses[0]}, "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        about["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return about | speed(case, seconds[3:], name)


def peft_model(case: Case, device: Any) -> Any:
    """Makes the model with random weights and LoRA; what is trained is float32."""
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(**SHAPES[case.model], attn_implementation="sdpa")
    config.use_cache = False
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if case.base == "nf4":
        quantize_layers(model.model.layers, device)
    if case.remat:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0,
        target_modules=list(TARGETS),
    )  # fmt: skip
    model = peft.get_peft_model(model.train(), settings)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model


def quantize_layers(layers: Any, device: Any) -> None:
    """Puts bitsandbytes' layers, with scales of 8 bits, in place of the linear ones."""
    import bitsandbytes as bnb
    import torch

    for module in list(layers.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is torch.nn.Linear:
                new = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, quant_type="nf4",
                    compute_dtype=torch.bfloat16, compress_statistics=True,
                )  # fmt: skip
                new.weight = bnb.nn.Params4bit(
                    layer.weight.data, requires_grad=False, quant_type="nf4",
                    compress_statistics=True, module=new,
                )  # fmt: skip
                setattr(module, name, new.to(device))
