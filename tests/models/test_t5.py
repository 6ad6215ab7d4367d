"""The T5 model: values of transformers (goldens), and properties that hold for any weights."""

import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax import names, paths, peft
from lora_jax.models import checkpoints, generate, hub, relative_positions, t5, t5_config
from lora_jax.models.decoding import Decoding
from tests.helpers import places, slow

# Made by scripts/make_t5_goldens.py.
GOLDENS = places.GOLDENS / "t5"
CASES = ("v1_0", "v1_1")
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


@functools.cache
def golden(case):
    with np.load(GOLDENS / case / "golden.npz") as file:
        values = dict(file)
    return [values[k] for k in INPUTS], values


@functools.cache
def config(case):
    return t5.T5Config.from_hf(hub.resolve(GOLDENS / case).config)


@functools.cache
def load(case, scan_layers=False):
    loaded = checkpoints.load(GOLDENS / case, head="seq2seq-lm", scan_layers=scan_layers)
    assert loaded.fresh == ()
    return loaded.model, loaded.params


def shapes(model):
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids)["params"]
    return paths.named_leaves(params)


# Whole programs: operation by operation, compiling takes ten times as long.
@functools.partial(jax.jit, static_argnums=0, static_argnames=("deterministic", "method"))
def run(model, params, *args, **options):
    return model.apply(params, *args, **options)


def test_doctests():
    assert not any(doctest.testmod(module).failed for module in (t5, t5_config, relative_positions))


def test_goldens_cover_both_versions():
    one, two = map(config, CASES)
    assert one.tie_word_embeddings and not two.tie_word_embeddings
    assert (one.feed_forward_proj, two.feed_forward_proj) == ("relu", "gated-gelu")
    assert two.num_decoder_layers != two.num_layers and one.num_heads * one.d_kv != one.d_model
    assert one.layer_norm_epsilon != two.layer_norm_epsilon
    longest = golden("v1_0")[0][0].shape[1]
    assert longest > one.relative_attention_max_distance


@pytest.mark.parametrize("scan_layers", slow.after(1, [False, True]))
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, scan_layers):
    args, values = golden(case)
    logits = run(*load(case, scan_layers), *args)
    real = args[3] > 0  # what a forbidden query gives is nobody's business
    assert np.abs(values["logits"][real]).max() > 1
    np.testing.assert_allclose(logits[real], values["logits"][real], rtol=0, atol=1e-5)


def test_buckets_equal_transformers():
    with np.load(GOLDENS / "buckets.npz") as file:
        for name, expected in file.items():
            count, furthest, both = map(int, name.split("_"))
            found = relative_positions.relative_buckets(
                jnp.arange(-600, 601),
                bidirectional=bool(both),
                num_buckets=count,
                max_distance=furthest,
            )
            np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize("scan_layers", slow.after(1, [False, True]))
def test_cached_decoding_equals_the_whole(scan_layers):
    """Some tokens at once, then one at a time, with left padding in a row; slots to spare."""
    case = "v1_1"
    model, params = load(case, scan_layers)
    (ids, mask, out, _), length = golden(case)[0], 12
    out_mask = np.ones((4, length), np.int32)
    out_mask[1, :2] = 0
    whole = run(model, params, ids, mask, out, out_mask[:, :10])
    memory = run(model, params, ids, mask, method="encode")
    cache = t5.init_cache(config(case), 4, length, scan_layers=scan_layers)
    step = functools.partial(run, model, params, memory=memory, method="decode")
    for start, stop in [(0, 4), *((k, k + 1) for k in range(4, 10))]:
        logits, cache = step(out[:, start:stop], out_mask, cache=cache)
        real = out_mask[:, start:stop] > 0
        np.testing.assert_allclose(
            logits[real], whole[:, start:stop][real], rtol=0, atol=1e-5, err_msg=str(start)
        )
    assert cache.index == 10


@pytest.mark.parametrize("beams", slow.after(1, [3, 1]))
@pytest.mark.parametrize("case", slow.after(1, CASES))
def test_texts_equal_transformers(case, beams):
    """The same tokens, from a batch that is padded on either side, with an end."""
    scan_layers = case == "v1_0"
    loaded = checkpoints.load(GOLDENS / case, head="seq2seq-lm", scan_layers=scan_layers)
    (ids, mask, *_), values = golden(case)
    begin, step = generate.seq2seq_lm(loaded.model, t5.init_cache)
    settings = Decoding(max_new_tokens=9, beams=beams, stop=(1,))
    made = generate.generator(begin, step, settings)(
        loaded.params, {"input_ids": ids, "attention_mask": mask}
    )
    expected = values[f"beams_{beams}"][:, 1:]
    np.testing.assert_array_equal(made.tokens[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.slow
def test_lifted_texts_equal_merged_ones_and_adapters_are_switched_at_run_time(beams):
    model, params = load("v1_1")
    ids, mask, *_ = golden("v1_1")[0]
    inputs = {"input_ids": ids, "attention_mask": mask}
    config = lora.LoRAConfig(rank=2, targets=t5.FAMILY.targets)
    adapter = lora.init(jax.random.key(0), model.apply, params, config, ids, mask, ids)
    settings, compiled = Decoding(max_new_tokens=6, beams=beams), []
    counted = lambda fn: lora.lift(lambda *args: compiled.append(1) or fn(*args))
    generators = [
        generate.generator(*generate.seq2seq_lm(model, t5.init_cache, **options), settings)
        for options in ({}, {"transform": counted})
    ]
    texts = []
    for seed in range(3):
        noise = lambda x: 0.7 * jax.random.normal(jax.random.key(seed), x.shape)
        drawn = jax.tree.map(lambda x: noise(x) if x.ndim > 1 else x, adapter)
        one, two = (
            generator(merged, inputs).tokens
            for generator, merged in zip(
                generators, (lora.merge(params, drawn), lora.bind(params, drawn)), strict=True
            )
        )
        np.testing.assert_array_equal(one, two)
        texts.append((one.tolist(), len(compiled)))
    (first, traced), (second, again), (third, last) = texts
    assert traced == again == last
    assert first != second != third


def test_left_padding_of_the_output_does_not_matter():
    model, params = load("v1_0")
    ids, mask, out, _ = golden("v1_0")[0]
    plain = run(model, params, ids, mask, out)
    padded, out_mask = np.pad(out, ((0, 0), (3, 0))), np.pad(np.ones_like(out), ((0, 0), (3, 0)))
    shifted = run(model, params, ids, mask, padded, out_mask)
    np.testing.assert_allclose(shifted[:, 3:], plain, rtol=0, atol=1e-5)


def test_what_stands_at_padding_does_not_matter():
    model, params = load("v1_0")
    ids, mask, out, out_mask = golden("v1_0")[0]
    other = np.where(mask, ids, (ids + 7) % 30)
    expected = run(model, params, ids, mask, out, out_mask)
    np.testing.assert_array_equal(run(model, params, other, mask, out, out_mask), expected)
    real = run(model, params, other, np.ones_like(mask), out, out_mask)
    assert np.abs(real - expected)[1].max() > 1e-2


def test_the_future_does_not_matter():
    model, params = load("v1_0")
    ids, mask, out, _ = golden("v1_0")[0]
    expected = run(model, params, ids, mask, out)
    found = run(model, params, ids, mask, np.where(np.arange(10) < 6, out, 9))
    np.testing.assert_array_equal(found[:, :6], expected[:, :6])
    assert np.abs(found - expected)[:, 6:].max() > 1e-2


def test_bfloat16_computes_near_float32_and_keeps_parameters():
    model, params = load("v1_1")
    args, values = golden("v1_1")
    logits = run(model.clone(dtype=jnp.bfloat16), params, *args)
    assert logits.dtype == jnp.float32
    real = args[3] > 0
    error = np.abs(logits - values["logits"])[real]
    # bfloat16 has 8 bits; errors of 2^-8 of values of some units add up over the layers.
    assert 0 < error.max() < 0.1 * np.abs(values["logits"][real]).max()


def test_a_row_without_tokens_is_finite():
    model, params = load("v1_0")
    ids, mask, out, out_mask = golden("v1_0")[0]
    mask, out_mask = np.zeros_like(mask), np.zeros_like(out_mask)
    model = model.clone(dtype=jnp.bfloat16)
    loss = lambda params: model.apply(params, ids, mask, out, out_mask).sum()
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert all(np.isfinite(x).all() for x in [value, *jax.tree.leaves(grads)])


@pytest.mark.parametrize("scan_layers", slow.after(1, [True, False]))
@pytest.mark.slow
def test_dropout_acts_while_training_only(scan_layers):
    model, params = load("v1_0", scan_layers)
    args, values = golden("v1_0")
    train = lambda seed: run(
        model, params, *args, deterministic=False, rngs={"dropout": jax.random.key(seed)}
    )
    assert np.abs(train(1) - train(2)).max() > 1e-2
    np.testing.assert_array_equal(train(1), train(1))
    still = model.clone(config=dataclasses.replace(config("v1_0"), dropout_rate=0.0))
    # Without rates no key is asked for; the program is another, and so is its rounding.
    np.testing.assert_allclose(
        run(still, params, *args, deterministic=False), run(model, params, *args), atol=1e-5
    )


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_table_is_a_bijection_onto_the_tree(case, scan_layers):
    model = t5.T5ForConditionalGeneration(config(case), scan_layers=scan_layers)
    leaves = shapes(model)
    rows = t5.names(config(case), scan_layers=scan_layers)
    assert sorted(row.flax for row in rows) == sorted(leaves)
    assert {row.flax for row in rows if row.transpose} == {n for n in leaves if "kernel" in n}
    tensors = [w.hf for w in names.weights(rows, leaves)]
    assert len(set(tensors)) == len(tensors)
    file = safetensors.numpy.load_file(GOLDENS / case / "model.safetensors")
    assert set(file) <= set(tensors)
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert set(tensors) - set(file) == tied - set(file)


FLAN_T5_BASE = {
    "model_type": "t5", "d_ff": 2048, "d_kv": 64, "d_model": 768, "decoder_start_token_id": 0,
    "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06,
    "n_positions": 512, "num_decoder_layers": 12, "num_heads": 12, "num_layers": 12,
    "output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "vocab_size": 32128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("about", "count"), [({"model_type": "t5"}, 60_506_624), (FLAN_T5_BASE, 247_577_856)]
)
def test_parameter_counts_of_t5_small_and_flan_t5_base(about, count):
    model = t5.T5ForConditionalGeneration(t5.T5Config.from_hf(about), scan_layers=True)
    assert sum(x.size for x in shapes(model).values()) == count


def test_initial_values_follow_the_config():
    """Raffel et al.'s: a query's have no root of d_kv left to divide by (Mesh TensorFlow)."""
    about = t5.T5Config(vocab_size=300, num_layers=1, initializer_factor=0.5)
    model = t5.T5ForConditionalGeneration(about)
    ids = jnp.ones((1, 1), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids, ids, ids)["params"]
    block = params["decoder"]["block_0"]
    std = {
        "shared": (params["shared"]["embedding"], 0.5),
        "q": (block["EncDecAttention"]["q"]["kernel"], 0.5 * (512 * 64) ** -0.5),
        "k": (block["SelfAttention"]["k"]["kernel"], 0.5 * 512**-0.5),
        "wo": (block["DenseReluDense"]["wo"]["kernel"], 0.5 * 2048**-0.5),
    }
    for name, (value, expected) in std.items():
        # At least 150,000 draws: the relative error of the estimate is about 0.2%.
        np.testing.assert_allclose(value.std(), expected, rtol=0.015, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bart"}, "model_type is 'bart'"),
        ({"d_model": 0}, "d_model must be a whole number"),
        ({"num_decoder_layers": 1.5}, "num_decoder_layers.*1.5"),
        ({"feed_forward_proj": "gated-swish2"}, "'gated-swish2' is not one of.*gelu"),
        ({"dropout_rate": 1}, "dropout_rate"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
        ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets"),
        ({"relative_attention_max_distance": 16}, "32 and 16"),
        ({"decoder_start_token_id": 40_000}, "decoder_start_token_id must be a token"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        t5.T5Config.from_hf({"model_type": "t5"} | changes)


def test_config_round_trip():
    for about in (t5.T5Config(), t5.T5Config.from_hf(FLAN_T5_BASE)):
        assert t5.T5Config.from_hf(about.to_hf()) == about
    assert t5.T5Config.from_hf({"model_type": "t5", "unknown": 1}) == t5.T5Config()
    # As transformers 5 writes version 1.1.
    newer = {"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert not t5.T5Config.from_hf(newer).tie_word_embeddings


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.ones((1, 3), int), np.ones((1, 4), int), np.ones((1, 2), int)), r"\(1, 3\).*\(1, 4\)"),
        ((np.ones(3, int), np.ones(3, int), np.ones((1, 2), int)), r"\(batch, length\)"),
        ((*[np.ones((2, 3), int)] * 3, np.ones((2, 4), int)), r"\(2, 3\).*\(2, 4\)"),
    ],
)
def test_bad_inputs(args, message):
    model, params = load("v1_0")
    with pytest.raises(ValueError, match=message):
        run(model, params, *args)


def test_what_is_saved_is_read_again_stacked_or_not(tmp_path):
    for case in CASES:
        loaded = checkpoints.load(GOLDENS / case, head="seq2seq-lm", scan_layers=True)
        checkpoints.save_hf(tmp_path / case, loaded.params, loaded.checkpoint, head="seq2seq-lm")
        again = checkpoints.load(tmp_path / case, head="seq2seq-lm")
        jax.tree.map(np.testing.assert_array_equal, again.params, load(case)[1])


def copy(case, directory, change):
    """The case with other tensors."""
    tensors = safetensors.numpy.load_file(GOLDENS / case / "model.safetensors")
    change(tensors)
    directory.mkdir()
    (directory / "config.json").write_bytes((GOLDENS / case / "config.json").read_bytes())
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return checkpoints.load(directory, head="seq2seq-lm").params["params"]


def test_other_layouts_of_the_embedding(tmp_path):
    """A head that equals the embedding is not stored; old files have the embedding four times."""
    params = copy("v1_1", tmp_path / "no head", lambda t: t.pop("lm_head.weight"))
    np.testing.assert_array_equal(params["lm_head"]["kernel"], params["shared"]["embedding"].T)
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tied = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    old = lambda t: t.update(
        {n: t["shared.weight"].copy() for n in tied}, **{unused: np.ones((8, 2), np.float32)}
    )
    params = copy("v1_0", tmp_path / "old", old)
    jax.tree.map(np.testing.assert_array_equal, params, load("v1_0")[1]["params"])
    with pytest.raises(ValueError, match="lm_head.weight differs from .*, to which it is tied"):
        other = lambda t: t.update({"lm_head.weight": t["shared.weight"] + 1})
        copy("v1_0", tmp_path / "other", other)


TRAINED = {"q": ("q", "v"), "linear": ("all-linear",), "tables": ("shared", "re:.*bias/embedding")}


@pytest.mark.parametrize(
    ("what", "scan_layers"), slow.after(1, [("q", False), ("linear", True), ("tables", False)])
)
def test_lift_equals_merge(what, scan_layers):
    """In training, and in decoding step by step."""
    model, params = load("v1_1" if what == "linear" else "v1_0", scan_layers)
    args = golden("v1_0")[0]
    config = lora.LoRAConfig(rank=2, targets=TRAINED[what])
    adapter = lora.init(jax.random.key(0), model.apply, params, config, *args)
    adapter = jax.tree.map(lambda x: x + 0.1 if x.ndim > 1 else x, adapter)

    def steps(params, ids, mask, out, out_mask):
        memory = model.apply(params, ids, mask, method="encode")
        cache = t5.init_cache(model.config, len(out), 10, scan_layers=scan_layers)
        logits = []
        for k in (0, 5):
            new, cache = model.apply(
                params, out[:, k : k + 5], out_mask, memory=memory, cache=cache, method="decode"
            )
            logits.append(new)
        return jnp.concatenate(logits, 1)

    real = args[3] > 0
    merged = run(model, lora.merge(params, adapter), *args)[real]
    assert np.abs(merged - run(model, params, *args)[real]).max() > 1e-2
    for fn in (model.apply, steps):
        lifted = jax.jit(lora.lift(fn, strict=True))(lora.bind(params, adapter), *args)
        np.testing.assert_allclose(lifted[real], merged, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_peft_names_the_tensors_as_transformers_does(scan_layers, tmp_path):
    """A cycle through PEFT's format; the tensors of each layer of each stack."""
    loaded = checkpoints.load(GOLDENS / "v1_1", head="seq2seq-lm", scan_layers=scan_layers)
    args, table = golden("v1_1")[0], checkpoints.names(loaded)
    config = lora.LoRAConfig(rank=2, targets=loaded.family.targets)
    adapter = lora.init(jax.random.key(0), loaded.model.apply, loaded.params, config, *args)
    about = {"names": table, "task_type": "SEQ_2_SEQ_LM"}
    peft.save_peft(tmp_path, loaded.params, adapter, config, **about)
    assert peft.read_words(tmp_path)["target_modules"] == ["q", "v"]
    parts = [("encoder", k, "0.SelfAttention") for k in range(3)]
    parts += [("decoder", k, x) for k in range(2) for x in ("0.SelfAttention", "1.EncDecAttention")]
    shapes = {"lora_A": (2, 12), "lora_B": (10, 2)}
    assert peft.tensor_shapes(tmp_path) == {
        f"{stack}.block.{k}.layer.{part}.{kernel}.{factor}.weight": shape
        for stack, k, part in parts
        for kernel in "qv"
        for factor, shape in shapes.items()
    }
    again, _ = peft.load_peft(tmp_path, loaded.params, names=table)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
