"""The model card of an exported adapter: ``README.md``, with the metadata of the Hub at its head.

A card says what is known from the adapter and from the directory of its run, and leaves out the
rest. Names and paths of the user's stand in code, where Markdown leaves them as they are; of the
path of a local file only the last part is given.
"""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lora_jax as lora
from lora_jax import adapter as adapters
from lora_jax import paths, peft, serialize
from lora_jax.files import read_object, write_atomically
from lora_jax.methods.tokens import Tokens
from lora_jax.models.checkpoints import Loaded
from lora_jax.models.families import CAUSAL_LM, CLASSIFIER, SEQ2SEQ_LM
from lora_jax.models.gguf import is_gguf
from lora_jax.models.hub import ALIASES, split_revision
from lora_jax.nodes import is_adapted
from lora_jax.tasks import adapter_bases, loading_code
from lora_jax.training import metric_writer, workdirs

NAME = "README.md"
_TASKS = {
    CLASSIFIER: "text-classification",
    CAUSAL_LM: "text-generation",
    SEQ2SEQ_LM: "text2text-generation",
}
# The Hub's names of metrics.
_METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
_EMBEDDED = {
    "reviews": "the review sentences that come with lora_jax",
    "tfds:lora_reviews": "the review sentences that come with lora_jax",
    "tutor:train": "the conversations that come with lora_jax",
}
_GLUE = "nyu-mll/glue"  # on the Hub, the data that TFDS has as glue
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)  # values of its --max-lora-rank
_VLLM_WORDS: dict[str, tuple] = {  # what its adapters must have in their adapter_config.json
    "peft_type": ("LORA",), "use_dora": (None, False), "modules_to_save": (None, []),
    "bias": (None, "none"), "lora_bias": (None, False), "trainable_token_indices": (None, {}, []),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What has been exported, for its card.

    Attributes:
      directory: directory of the files, which the card is written into.
      adapter_directory: directory of the adapter that was exported.
      loaded: the base.
      adapter: the adapter.
      config: settings of the adapter.
      labels: names of the classes; () for a model that generates.
      is_merged: whether the files are a whole model, and no adapter.
      repo: repository of the Hub that the files are for; "" for none.
      license: the Hub's name of the license; "" leaves it out.
      program: name of the program that trained the adapter; "" if it is not known.
    """

    directory: Path
    adapter_directory: Path
    loaded: Loaded
    adapter: Any
    config: lora.LoRAConfig
    labels: tuple[str, ...] = ()
    is_merged: bool = False
    repo: str = ""
    license: str = ""
    program: str = ""


def write(export: Export) -> None:
    """Writes the card into the directory of an export.

    Raises:
      ValueError: the files of the adapter or of its run are damaged.
      OSError: the card can't be written.
    """
    write_atomically(export.directory / NAME, make_text(export).encode())


def make_text(export: Export) -> str:
    """Makes the text of a card: metadata between lines of dashes, and Markdown."""
    import yaml  # it comes with huggingface_hub

    data = make_metadata(export)
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
    parts = [f"---\n{head}---", f"# {_escape(_title(export))}", _introduce(export)]
    parts += [*_list_scores(export), *_describe_training(export), *_explain_use(export)]
    return "\n\n".join(filter(None, parts)) + "\n"


def make_metadata(export: Export) -> dict[str, Any]:
    """Makes the metadata of a card, with the Hub's keys; those that are not known are left out."""
    base, data = find_hub_base(export.loaded), read_run(export.adapter_directory).get("data", {})
    dataset, scores = find_dataset(data), read_scores(export.adapter_directory)
    method = export.config.method
    about = {
        "base_model": base,
        "base_model_relation": base and ("finetune" if export.is_merged else "adapter"),
        "library_name": "transformers" if export.is_merged else "peft",
        "pipeline_tag": _TASKS.get(export.loaded.head),
        "license": export.license,
        "datasets": [dataset] if dataset else [],
        "metrics": [_METRICS[name] for name in scores if name in _METRICS],
        "tags": ["lora", "lora_jax", *([] if method == "lora" else [method])],
        "model-index": _make_index(export, dataset, data, scores),
    }
    return {key: value for key, value in about.items() if value}


def _make_index(
    export: Export, dataset: str, data: Mapping[str, Any], scores: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Makes the list of results; the Hub wants a data set of its own for each."""
    metrics = [
        {"type": _METRICS[name], "value": round(value, 4)}
        for name, value in scores.items()
        if name in _METRICS
    ]
    if not (dataset and metrics):
        return []
    source = {"type": dataset, "name": _name_data(data)}
    task = {"type": _TASKS[export.loaded.head]}
    result = {"task": task, "dataset": source, "metrics": metrics}
    return [{"name": _title(export), "results": [result]}]


def find_hub_base(loaded: Loaded) -> str:
    """Returns the name that a base has on the Hub, without its revision; "" if it is a local one.

    A short name that the Hub redirects is given in full.
    """
    checkpoint = loaded.checkpoint
    if checkpoint.origin in ("directory", "file") or is_gguf(checkpoint.directory):
        return ""
    name, _ = split_revision(checkpoint.name)
    return ALIASES.get(name, name)


def find_dataset(data: Mapping[str, Any]) -> str:
    """Returns the name on the Hub of the data of a run; "" if they are not known to be there.

    >>> find_dataset({"source": "datasets:ag_news@default"}), find_dataset({"source": "a.csv"})
    ('ag_news', '')
    """
    source = _find_source(data)
    if source.startswith("tfds:glue/"):
        return _GLUE
    match = re.match(r"datasets:(\w[\w.-]*(?:/\w[\w.-]*)?)(?:[@:]|$)", source)
    return match[1] if match else ""


def _find_source(data: Mapping[str, Any]) -> str:
    source = data.get("source") or data.get("train") or ""
    return source if isinstance(source, str) else ""


def _name_data(data: Mapping[str, Any]) -> str:
    """Names the data of a run, without the directories of a file."""
    source = _find_source(data)
    if re.match(r"(tfds|datasets):\w", source):
        return source.partition(":")[2]
    return Path(source).name


def _describe_data(data: Mapping[str, Any]) -> str:
    source = _find_source(data)
    if not source or source in _EMBEDDED:
        return _EMBEDDED.get(source, "")
    place = {"tfds": " (TensorFlow Datasets)", "datasets": " (Hugging Face)"}
    return f"{_code(_name_data(data))}{place.get(source.partition(':')[0], ' (local)')}"


def read_run(adapter: Path) -> dict[str, Any]:
    """Reads the config of the run that an adapter is the best one of; {} if it is not there.

    Raises:
      ValueError: it is damaged.
    """
    path = adapter.absolute().parent / workdirs.CONFIG
    if adapter.absolute().name != workdirs.ADAPTER or not path.is_file():
        return {}
    return read_object(path)


def read_scores(adapter: Path) -> dict[str, float]:
    """Reads the scores of an adapter's evaluation; {} for one in PEFT's format, which has none."""
    if adapter_bases.is_peft(adapter):
        return {}
    values = serialize.read_metadata(adapter)
    return {name: x for name, x in values.items() if isinstance(x, float) and abs(x) < 1e30}


def _title(export: Export) -> str:
    return export.repo.rpartition("/")[2] or export.directory.absolute().name


def _introduce(export: Export) -> str:
    what = "A model with a LoRA adapter merged into it" if export.is_merged else "A LoRA adapter"
    local = f"{_code(_last_part(export.loaded.checkpoint.name))} (local)"
    base = find_hub_base(export.loaded)
    rows = {
        "base": _code(base) if base else local,
        "task": _describe_task(export),
        "data": _describe_data(read_run(export.adapter_directory).get("data", {})),
        "method": _describe_method(export),
        "parameters": lora.summary(export.loaded.params, export.adapter).replace("||", "·"),
        "made with": f"lora_jax {lora.__version__}",
    }
    return f"{what}, trained with lora_jax.\n\n{_make_table(['', ''], rows.items())}"


def _describe_task(export: Export) -> str:
    task = _TASKS.get(export.loaded.head, "").replace("-", " ")
    if len(export.labels) == 1:
        return f"regression: {_code(export.labels[0])}"
    labels = ", ".join(map(_code, export.labels[:50]))
    return f"{task}{f' ({len(export.labels)} classes): ' if labels else ''}{labels}"


def _describe_method(export: Export) -> str:
    """Describes the method, with what is adapted and what is trained in full."""
    config, nodes = export.config, adapters.nodes(export.adapter)
    adapted = {name: x for name, x in nodes.items() if is_adapted(x) and not isinstance(x, Tokens)}
    full = [name for name, x in nodes.items() if not is_adapted(x)]
    parts = [{"lora": "LoRA", "dora": "DoRA"}.get(config.method, config.method)]
    if adapted:
        parts += [f"rank {config.rank}", f"alpha {config.alpha:g}", f"dropout {config.dropout:g}"]
        parts += [f"{len(adapted)} kernels: {_code(paths.listing(adapted))}"]
    if full:
        parts += [f"trained in full: {_code(paths.listing(full))}"]
    return ", ".join(parts)


def _list_scores(export: Export) -> Iterator[str]:
    """Lists the scores of the evaluation, beside those before the first step."""
    scores = read_scores(export.adapter_directory)
    if not scores:
        return
    run = export.adapter_directory.absolute().parent
    has_run = bool(read_run(export.adapter_directory))
    before = metric_writer.read_evaluation(run / workdirs.METRICS, 0) if has_run else {}
    step = serialize.read_metadata(export.adapter_directory).get("step")
    old = {name: f"{before[name]:.4f}" if name in before else "" for name in scores}
    rows = [[name, *([old[name]] if before else []), f"{x:.4f}"] for name, x in scores.items()]
    head = ["", *(["before training"] if before else []), f"step {step}"]
    yield "## Scores\n\nOf the evaluation by which the best adapter of the run was chosen."
    yield _make_table(head, rows)


def _describe_training(export: Export) -> Iterator[str]:
    """Gives the command and the config of the run."""
    config = read_run(export.adapter_directory)
    if not config:
        return
    text = json.dumps(_shorten_paths(config), indent=2, ensure_ascii=False)
    yield "## Training"
    if export.program:
        command = (
            f"python -m experiments.{export.program} --config=config.json --workdir=runs/again"
        )
        yield f"{_fence(command, 'console')}\n\nin a checkout of lora_jax, with this `config.json`:"
    yield f"<details><summary>config.json</summary>\n\n{_fence(text, 'json')}\n\n</details>"


def _shorten_paths(value: Any) -> Any:
    """Leaves the last part of each path that begins at a root or at home."""
    if isinstance(value, Mapping):
        return {name: _shorten_paths(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_shorten_paths(x) for x in value]
    return _last_part(value) if isinstance(value, str) else value


def _last_part(text: str) -> str:
    return Path(text).name if os.path.isabs(text) or text.startswith("~") else text


def _explain_use(export: Export) -> Iterator[str]:
    """Says how the files are opened, in each program that can."""
    place = export.repo or export.directory.absolute().name
    yield "## Use"
    if export.is_merged:
        code = f"from transformers import AutoModelFor{loading_code.AUTO[export.loaded.head]}\n"
        code += f"model = {code.split()[-1]}.from_pretrained({place!r})"
        yield f"With transformers:\n\n{_fence(code, 'python')}"
    else:
        base = find_hub_base(export.loaded) or "DIRECTORY_OF_THE_BASE"
        lines = loading_code.write_peft_lines(place, export.loaded, base=base)
        yield f"With PEFT:\n\n{_fence(lines, 'python')}"
        yield f"With lora_jax:\n\n{_fence(_write_lora_jax_lines(export), 'console')}"
    if command := write_vllm_command(export):
        yield f"With vLLM:\n\n{_fence(command, 'console')}"


def _write_lora_jax_lines(export: Export) -> str:
    name = shlex.quote(_title(export))
    lines = [f"hf download {export.repo} --local-dir {name}"] if export.repo else []
    program, text = (
        ("chat", "Hello!") if export.loaded.head == CAUSAL_LM else ("predict", "A text.")
    )
    model = "" if find_hub_base(export.loaded) else " --model=DIRECTORY_OF_THE_BASE"
    return "\n".join([*lines, f'python -m experiments.{program} --adapter={name}{model} "{text}"'])


def write_vllm_command(export: Export) -> str:
    """Writes the command that serves the files with vLLM; "" for what it does not serve.

    It serves language models, with adapters of plain LoRA that train nothing else.
    """
    place = shlex.quote(export.repo or export.directory.absolute().name)
    if export.loaded.head != CAUSAL_LM:
        return ""
    if export.is_merged:
        return f"vllm serve {place}"
    words = peft.read_words(export.directory)
    rank = max([words["r"], *(words.get("rank_pattern") or {}).values()])
    if any(words.get(name) not in fits for name, fits in _VLLM_WORDS.items()):
        return ""
    limit = next((x for x in _VLLM_RANKS if x >= rank), None)
    base = find_hub_base(export.loaded) or "DIRECTORY_OF_THE_BASE"
    modules = f"--lora-modules {shlex.quote(_title(export))}={place}"
    return f"vllm serve {base} --enable-lora --max-lora-rank {limit} {modules}" if limit else ""


def _escape(text: str) -> str:
    """Escapes what Markdown would read as more than text."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", _join(text))


def _code(text: str) -> str:
    """Sets a text as code, also in a table."""
    text = _join(text).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _join(text: str) -> str:
    """Returns a text in one line, without characters that are not printed."""
    return " ".join("".join(x if x.isprintable() else " " for x in text).split())


def _fence(text: str, language: str) -> str:
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def _make_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *(row for row in rows if row[-1])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
