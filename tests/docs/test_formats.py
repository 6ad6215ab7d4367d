"""docs/formats.md names every file and key: it is held against the code, and real listings against it."""

import dataclasses
import fnmatch
import re

import pytest

from lora_jax.data import conversation_formats, messages
from lora_jax.models import encoder, gpt2_config, hub, mixtral, registry
from lora_jax.peft import config, directory_files, producers
from lora_jax.tasks import glue, task_file
from tests.helpers.places import ROOT

TREATMENTS = {"read", "ignored", "refused"}
PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
SECTIONS = {
    part.partition("\n")[0].replace("`", ""): part
    for part in re.split(r"^### ", PAGE, flags=re.M)[1:]
}


def rows(section):
    """The rows of a section's tables: names in the first column, the treatment, and the rest."""
    for line in SECTIONS[section].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) > 1:
            yield re.findall(r"`([^`]+)`", cells[0]), cells[1], " | ".join(cells[2:])


def named(section):
    """What becomes of each name that a section has."""
    return {name: treatment for names, treatment, _ in rows(section) for name in names}


def find(section, name):
    """What a section says of a name; the first row that fits counts."""
    patterns = named(section)
    return next((patterns[p] for p in patterns if fnmatch.fnmatchcase(name, p)), None)


def test_every_row_has_a_treatment_and_a_reason():
    tables = [section for section in SECTIONS if section != "Adapters of other programs"]
    for section in tables:
        found = list(rows(section))
        assert found, section
        for names, treatment, reason in found:
            assert treatment in TREATMENTS and reason.strip(), (section, names)
        names = [name for some, _, _ in found for name in some]
        assert len(names) == len(set(names)), section


# The page against the code.


def test_files_of_an_adapter_are_those_of_the_code():
    told = [
        (tuple(names), treatment, reason)
        for names, treatment, reason in rows("Files of an adapter")
    ]
    assert told == [tuple(treatment) for treatment in directory_files.FILES]


def test_words_of_an_adapter_are_those_of_the_code():
    told = named("adapter_config.json")
    wanted = dict.fromkeys(config.READ, "read")
    wanted |= {name: "ignored" for name in config.IGNORED if name not in wanted}
    wanted |= dict.fromkeys(config.REFUSED, "refused") | {"*": "refused"}
    assert told == wanted
    assert set(config.DEFAULTS) <= set(told)
    reasons = {name: reason for names, _, reason in rows("adapter_config.json") for name in names}
    for table in (config.IGNORED, config.REFUSED):
        for name, why in table.items():
            assert name in config.READ or reasons[name].startswith(why)


def test_keys_of_the_task_file_are_those_of_the_code():
    assert list(named("lora_jax.json")) == ["format", "format_version", *task_file.KEYS]


def test_other_programs_are_those_of_the_code():
    for producer in producers.PRODUCERS:
        line = next(x for x in PAGE.splitlines() if x.startswith(f"| {producer.name} |"))
        assert all(f"`{pattern}`" in line for pattern in producer.files)
        assert producer.advice in line and "| refused |" in line


def test_files_that_a_checkpoint_is_downloaded_with_are_read_or_refused():
    for name in ("config.json", hub.WEIGHTS, hub.INDEX, "model-00001-of-00002.safetensors"):
        assert find("Files of a checkpoint", name) == "read"
    for name in hub.TOKENIZER_FILES:
        assert find("Files of a checkpoint", name) == "read"
        assert find("Files of a tokenizer", name) or name == "generation_config.json"
        assert find("Files of an adapter", name) == "read"


def test_keys_of_configs_are_those_of_the_families():
    own = {"rope", "sliding_rope"}  # made of several keys
    for family in registry.FAMILIES:
        for field in dataclasses.fields(family.config):
            assert field.name in own or find("config.json", field.name) == "read", field.name
    built = {*encoder.BUILT, *gpt2_config._BUILT, *mixtral.BUILT}
    assert {find("config.json", name) for name in built} == {"refused"}


def test_tensors_that_are_left_out_are_those_of_the_families():
    told = named("Tensors of a checkpoint")
    assert set(told) == {pattern for family in registry.FAMILIES for pattern in family.ignored}


def test_keys_of_conversations_are_those_of_the_code():
    formats = conversation_formats.FORMATS.values()
    keys = {key for x in formats for key in (*x.required, *x.optional)}
    keys |= {*conversation_formats._COMMON, *(f"messages.{key}" for key in messages._KEYS)}
    rows = {name for name, x in named("Rows of conversations").items() if x == "read"}
    assert rows == keys
    for key in ("id", "source", "score", "messages.function_call"):
        assert find("Rows of conversations", key) == "refused"


def test_columns_are_those_of_the_tasks():
    told = named("Rows of sentences")
    for task in glue.TASKS.values():
        assert {*task.layout.columns, task.layout.label} <= set(told)


# Real listings against the page.

ADAPTERS = {
    "PEFT": "README.md adapter_config.json adapter_model.safetensors",
    "an old PEFT": ".gitattributes README.md adapter_config.json adapter_model.bin",
    "Trainer": "README.md adapter_config.json adapter_model.safetensors optimizer.pt rng_state.pth "
    "scheduler.pt trainer_state.json training_args.bin",
    "Trainer on several GPUs": "adapter_config.json adapter_model.safetensors rng_state_0.pth "
    "rng_state_1.pth global_step500 latest zero_to_fp32.py scaler.pt optimizer_0 pytorch_model_fsdp_0",
    "TRL": "README.md adapter_config.json adapter_model.safetensors added_tokens.json "
    "chat_template.jinja merges.txt special_tokens_map.json tokenizer.json tokenizer_config.json "
    "vocab.json training_args.bin checkpoint-500 runs all_results.json train_results.json",
    "Unsloth": ".gitattributes README.md adapter_config.json adapter_model.safetensors "
    "chat_template.jinja special_tokens_map.json tokenizer.json tokenizer.model tokenizer_config.json",
    "LLaMA-Factory": "README.md adapter_config.json adapter_model.safetensors all_results.json "
    "eval_results.json special_tokens_map.json tokenizer.json tokenizer_config.json "
    "train_results.json trainer_log.jsonl trainer_state.json training_args.bin training_loss.png "
    "training_eval_loss.png value_head.safetensors",
    "Axolotl": "README.md adapter_config.json adapter_model.bin config.json debug.log "
    "special_tokens_map.json tokenizer.model tokenizer_config.json axolotl_config.yaml",
    "a vision model": "adapter_config.json adapter_model.safetensors preprocessor_config.json "
    "processor_config.json video_preprocessor_config.json chat_template.json additional_chat_templates non_lora_trainables.bin",
    "sentence-transformers": "1_Pooling adapter_config.json adapter_model.safetensors modules.json "
    "config_sentence_transformers.json sentence_bert_config.json README.md tokenizer.json vocab.txt",
    "LongLoRA": "adapter_config.json adapter_model.bin trainable_params.bin README.md",
    "vLLM": "adapter_config.json adapter_model.safetensors new_embeddings.safetensors",
    "this library": "adapter.json adapter-0123456789abcdef.safetensors",
    "what this library exports": "adapter_config.json adapter_model.safetensors lora_jax.json",
}
CHECKPOINTS = {
    "google-bert/bert-base-uncased": ".gitattributes LICENSE README.md config.json coreml "
    "flax_model.msgpack model.onnx model.safetensors pytorch_model.bin rust_model.ot tf_model.h5 "
    "tokenizer.json tokenizer_config.json vocab.txt",
    "FacebookAI/roberta-base": ".gitattributes README.md config.json dict.txt flax_model.msgpack "
    "merges.txt model.safetensors pytorch_model.bin rust_model.ot tf_model.h5 tokenizer.json "
    "tokenizer_config.json vocab.json",
    "openai-community/gpt2": ".gitattributes 64.tflite 64-8bits.tflite README.md config.json "
    "flax_model.msgpack generation_config.json merges.txt model.safetensors onnx pytorch_model.bin "
    "rust_model.ot tf_model.h5 tokenizer.json tokenizer_config.json vocab.json",
    "google-t5/t5-small": ".gitattributes README.md config.json flax_model.msgpack "
    "generation_config.json model.safetensors onnx pytorch_model.bin rust_model.ot spiece.model "
    "tf_model.h5 tokenizer.json tokenizer_config.json",
    "meta-llama/Llama-3.1-8B-Instruct": ".gitattributes LICENSE README.md USE_POLICY.md config.json "
    "generation_config.json model-00001-of-00004.safetensors model.safetensors.index.json original "
    "special_tokens_map.json tokenizer.json tokenizer_config.json",
    "mistralai/Mistral-7B-Instruct-v0.3": "config.json consolidated.safetensors params.json "
    "generation_config.json model-00001-of-00003.safetensors model.safetensors.index.json "
    "special_tokens_map.json tokenizer.json tokenizer.model tokenizer_config.json",
    "Qwen/Qwen3-8B": ".gitattributes LICENSE README.md config.json generation_config.json merges.txt "
    "model-00001-of-00005.safetensors model.safetensors.index.json tokenizer.json "
    "tokenizer_config.json vocab.json",
    "google/gemma-2-2b-it": ".gitattributes README.md config.json generation_config.json "
    "model-00001-of-00002.safetensors model.safetensors.index.json special_tokens_map.json "
    "tokenizer.json tokenizer.model tokenizer_config.json",
    "sentence-transformers/all-MiniLM-L6-v2": ".gitattributes 1_Pooling README.md config.json "
    "config_sentence_transformers.json data_config.json model.safetensors modules.json onnx openvino "
    "pytorch_model.bin rust_model.ot sentence_bert_config.json special_tokens_map.json tf_model.h5 "
    "tokenizer.json tokenizer_config.json train_script.py vocab.txt",
    "unsloth/llama-3-8b-bnb-4bit": ".gitattributes README.md config.json generation_config.json "
    "model.safetensors special_tokens_map.json tokenizer.json tokenizer_config.json",
    "a GPTQ": "config.json model.safetensors quantize_config.json quant_config.json tokenizer.json",
    "a GGUF": "README.md SmolLM2-135M-Instruct.Q4_1.gguf",
    "an own run": "config.json model.safetensors optimizer.pt scheduler.pt rng_state.pth "
    "trainer_state.json training_args.bin all_results.json eval_results.json runs checkpoint-500",
}
# Keys of config.json that transformers 5.23 writes for the families here, and older ones.
CONFIG_KEYS = """
_name_or_path _sliding_window_pattern architectures bos_token_id chunk_size_feed_forward dense_act_fn
dtype hidden_activation id2label is_gated_act label2id max_window_layers output_attentions
output_hidden_states pretraining_tp problem_type qa_dropout reorder_and_upcast_attn return_dict
rope_parameters scale_decoder_outputs sinusoidal_pos_embds summary_activation summary_first_dropout
summary_proj_to_labels summary_type summary_use_proj transformers_version use_cache
use_sliding_window add_cross_attention is_decoder is_encoder_decoder partial_rotary_factor
position_embedding_type use_bidirectional_attention rope_scaling rope_theta rope_local_base_freq
torch_dtype quantization_config sliding_window_pattern n_ctx directionality pooler_fc_size
pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
gradient_checkpointing finetuning_task pruned_heads output_past task_specific_params
torchscript tokenizer_class auto_map unsloth_version unsloth_fixed cache_implementation
attn_implementation use_bfloat16 no_repeat_ngram_size num_beams
""".split()
TOKENIZER_KEYS = """
add_bos_token add_eos_token add_prefix_space added_tokens_decoder additional_special_tokens
bos_token chat_template clean_up_tokenization_spaces cls_token do_basic_tokenize do_lower_case
eos_token errors extra_ids extra_special_tokens legacy mask_token max_length model_input_names
model_max_length name_or_path never_split pad_to_multiple_of pad_token pad_token_type_id padding_side
processor_class sep_token sp_model_kwargs spaces_between_special_tokens special_tokens_map_file
split_special_tokens stride strip_accents tokenize_chinese_chars tokenizer_class tokenizer_file
trim_offsets truncation_side truncation_strategy unk_token use_default_system_prompt auto_map backend
is_local
""".split()
# Words of adapter_config.json of several versions of PEFT, and of programs that use it.
WORDS = """
alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias
corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode
init_lora_weights kasa_config layer_replication layers_pattern layers_to_transform loftq_config
lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core modules_to_save
monteclora_config peft_type peft_version qalora_group_size r rank_pattern revision target_modules
target_parameters task_type trainable_token_indices use_bdlora use_dora use_qalora use_rslora
velora_config runtime_config enable_lora merge_weights quantization_config
""".split()
DATA_KEYS = {
    "Rows of conversations": "messages messages.role messages.content messages.tool_calls "
    "messages.name messages.thinking tools id source score",
    "Rows of sentences": "sentence label sentence1 sentence2 question premise hypothesis mr ref",
}
GGUF_KEYS = """
general.architecture general.type general.name general.basename general.size_label general.license
general.file_type general.quantization_version llama.block_count llama.context_length
llama.embedding_length llama.feed_forward_length llama.attention.head_count
llama.rope.dimension_count llama.rope.freq_base llama.vocab_size qwen2.block_count
gemma3.attention.sliding_window tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens
tokenizer.ggml.merges tokenizer.ggml.bos_token_id tokenizer.chat_template
quantize.imatrix.file split.count split.no
""".split()


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_file_of_an_adapter_is_on_the_page(name):
    for file in ADAPTERS[name].split():
        treatment = directory_files.find_treatment(file)
        assert treatment and find("Files of an adapter", file) == treatment.treatment, file


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_file_of_a_checkpoint_is_on_the_page(name):
    for file in CHECKPOINTS[name].split():
        told = find("Files of a checkpoint", file) or find("Files of a tokenizer", file)
        assert told in TREATMENTS, file


@pytest.mark.parametrize(
    "section, keys",
    [
        ("adapter_config.json", WORDS),
        ("config.json", CONFIG_KEYS),
        ("tokenizer_config.json", TOKENIZER_KEYS),
        ("Metadata of a GGUF file", GGUF_KEYS),
        *((section, keys.split()) for section, keys in DATA_KEYS.items()),
    ],
)
def test_every_key_is_on_the_page(section, keys):
    assert not [key for key in keys if find(section, key) is None]
    if section == "adapter_config.json":  # and not by the row for what is unknown
        assert set(keys) <= set(named(section))
