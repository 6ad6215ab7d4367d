"""Makes tests/goldens/quantized: what bitsandbytes stores, and PEFT's gradients over it.

    python scripts/make_quantized_goldens.py

Needs the extra `parity`, and the packages bitsandbytes, accelerate and compressed-tensors; the last
one writes compressed_tensors.npz: kernels of 4 bits in groups of 32 inputs. cases.npz has kernels
``(out, in)`` with what bitsandbytes makes of them. `nf4_double`, `fp4` and `int8` are checkpoints
of one tiny Llama as `save_pretrained` writes them, whose parameters are bfloat16. `adapter` is
PEFT's, over the first of them, and golden.npz has each model's logits with decoded kernels in
float32, and the loss and gradients of the adapter.

Decoding follows the flat order of blocks (bitsandbytes' kernel for AVX-512 does not, where blocks
do not divide the inputs), and gradients are of plain layers with the decoded kernels: the backward
pass of bitsandbytes itself rounds them to bfloat16, the forward pass does not.
"""

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import peft
import torch
import transformers
from bitsandbytes import functional

OUT = Path(__file__).parent.parent / "tests" / "goldens" / "quantized"
CONFIGS = {
    "nf4_double": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def unpacked(data):
    """Two codes of each byte, the one in the high bits first."""
    data = data.reshape(-1)
    return torch.stack([data >> 4, data & 15], 1).reshape(-1).long()


def decoded(data, state):
    """Entry times scale in float32, block after block of the flat array."""
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    count = state.shape.numel()
    values = state.code[unpacked(data)[:count]]
    return (values * scales.float().repeat_interleave(state.blocksize)[:count]).view(state.shape)


def kernels():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    made = {
        "normal": draw(32, 128), "small": draw(16, 64) / 1000, "rows_of_96": draw(24, 96),
        "ragged": draw(10, 11), "odd": draw(5, 7), "zeros": draw(4, 64),
        "rows_apart": draw(160, 128) * torch.logspace(-2, 0, 160)[:, None],
    }  # fmt: skip
    made["zeros"][2] = 0
    for kind in ("nf4", "fp4"):
        table = functional.get_4bit_type(kind, device="cpu").sort().values.unique()
        middles = (table[:-1] + table[1:]) / 2
        ties = torch.cat([torch.ones(1), middles, torch.nextafter(middles, torch.tensor(2.0)),
                          torch.nextafter(middles, torch.tensor(-2.0))])  # fmt: skip
        made[f"{kind}_ties"] = torch.nn.functional.pad(ties, (0, 64 - len(ties)))[None]
    return made


def cases():
    found = {"dynamic": functional.create_dynamic_map()}
    for name, w in kernels().items():
        found[f"{name}/w"] = w
        for kind in ("nf4", "fp4"):
            found[f"{kind}/table"] = functional.get_4bit_type(kind, device="cpu")
            if name.endswith("ties") and not name.startswith(kind):
                continue
            if name == "rows_apart" and kind != "nf4":
                continue  # enough, at 20,480 numbers
            for suffix, nested in (("", False), ("_double", True)):
                data, state = functional.quantize_4bit(
                    w, blocksize=64, quant_type=kind, compress_statistics=nested
                )
                key = f"{name}/{kind}{suffix}"
                found |= {f"{key}/codes": data, f"{key}/scales": state.absmax}
                if nested:
                    found |= {f"{key}/nested": state.state2.absmax, f"{key}/offset": state.offset}
                found[f"{key}/decoded"] = decoded(data, state)
        if not name.endswith("ties") and name != "rows_apart":
            whole = bnb.nn.Int8Params(w.clone(), requires_grad=False).to("cpu")
            found |= {f"{name}/int8/codes": whole.data, f"{name}/int8/scales": whole.SCB}
            found[f"{name}/int8/decoded"] = functional.int8_vectorwise_dequant(
                whole.data, whole.SCB
            )
    return {name: np.asarray(x) for name, x in found.items()}


def compressed():
    """A kernel with and without zeros, as compressed-tensors packs it, and its own decoding."""
    from compressed_tensors.compressors.pack_quantized import base
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    g, found = torch.Generator().manual_seed(0), {}
    for kind in ("sym", "asym"):
        w = torch.randn(24, 96, generator=g)
        low, high = (op(w.reshape(24, 3, 32), -1) for op in (torch.amin, torch.amax))
        if kind == "sym":
            scale, zero = torch.maximum(-low, high) / 7.5, torch.zeros(24, 3, dtype=torch.int8)
        else:
            scale = (high - low) / 15
            zero = (-8 - low / scale).round().clamp(-8, 7).to(torch.int8)
        args = QuantizationArgs(
            num_bits=4, type="int", symmetric=kind == "sym", strategy="group", group_size=32
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        tensors = {"weight": w, "weight_scale": scale, "weight_zero_point": zero}
        packed = base.PackedQuantizationCompressor.compress(tensors, scheme)
        decoded = base.PackedQuantizationCompressor.decompress(dict(packed), scheme)["weight"]
        found |= {f"{kind}/{n}": x for n, x in packed.items()} | {f"{kind}/decoded": decoded}
    return {name: np.asarray(x) for name, x in found.items()}


def base_model():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.ndim == 2 else 1)
    return model


def numbers(module):
    if isinstance(module, bnb.nn.Linear4bit):
        return decoded(module.weight.data, module.weight.quant_state)
    return functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)


def on_plain_layers(quantized):
    """The model in float32 with decoded kernels, not rounded to bfloat16."""
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    of = {f"{n}.weight": numbers(m) for n, m in quantized.named_modules() if isinstance(m, kinds)}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    rest = {n: p.float() for n, p in quantized.named_parameters() if n not in of}
    model.load_state_dict({**rest, **{n: w.float() for n, w in of.items()}})
    return model


def gradients(model, ids, labels, directory):
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape) * 0.02)
    loss = adapted(input_ids=ids, labels=labels).loss
    loss.backward()
    adapted.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
    short = lambda n: n.removeprefix("base_model.model.").replace(".default", "")
    return {"loss": loss.detach(), **{f"gradient/{short(n)}": g for n, g in grads.items()}}


def main(out=OUT):
    torch.set_num_threads(1)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    np.savez_compressed(out / "cases.npz", **cases())
    np.savez_compressed(out / "compressed_tensors.npz", **compressed())
    plain = out / "plain"
    base_model().save_pretrained(plain)
    ids = torch.randint(3, SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(5))
    golden = {"ids": ids}
    for name, options in CONFIGS.items():
        config = transformers.BitsAndBytesConfig(**options)
        load = lambda path, **rest: transformers.LlamaForCausalLM.from_pretrained(
            path, device_map={"": "cpu"}, **rest
        )
        load(plain, quantization_config=config, dtype=torch.bfloat16).save_pretrained(out / name)
        (out / name / "generation_config.json").unlink(missing_ok=True)
        model = on_plain_layers(load(out / name))
        golden[f"{name}/logits"] = model(input_ids=ids).logits.detach()
        if name == "nf4_double":
            golden |= gradients(model, ids, ids, out / "adapter")
    shutil.rmtree(plain)
    np.savez_compressed(out / "golden.npz", **{n: np.asarray(x) for n, x in golden.items()})
    versions = {m.__name__: m.__version__ for m in (bnb, peft, torch, transformers, np)}
    (out / "made_by.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
