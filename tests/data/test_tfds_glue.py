"""``tfds:glue/sst2`` for real: a download from a local server, unpacked, written, read back."""

import contextlib
import hashlib
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
import zipfile
from typing import NamedTuple

import pytest

needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="needs TensorFlow to prepare the data: pip install 'lora_jax[tfds-prepare]'",
)

TRAIN = [
    ("hide new secretions from the parental units ", 0),
    ('a " quote that never closes', 1),
    ("café – naïve", 1),
    ("contains no wit", 0),
    ("so-so", 0),
]
DEV = [("it 's a charming and often affecting journey . ", 1), ("bleak", 0)]
TEST = ["uneasy mishmash", "a film", "another film"]

# The whole of what a user runs is load(...); the lines above it only put the local address, and its
# checksum, where TFDS has those of the real file.
PREPARE = """
import sys
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.text import glue
from lora_jax.data.sources import load
url, digest, size, data_dir, file_format = sys.argv[1:]
config, = (c for c in glue.Glue.BUILDER_CONFIGS if c.name == "sst2")
config.data_url = url
known = checksums.UrlInfo(size=int(size), checksum=digest, filename="SST-2.zip")
glue.Glue.url_infos[url] = known
if file_format == "tfrecord":
    import tensorflow_datasets as tfds
    tfds.builder("glue/sst2", data_dir=data_dir).download_and_prepare(file_format=file_format)
load("tfds:glue/sst2", "train", data_dir=data_dir)
"""

READ = """
import json, sys
from lora_jax.data.sources import SPLITS, load
splits = {s: load("tfds:glue/sst2", s, data_dir=sys.argv[1]) for s in SPLITS}
out = {s: [x.sentences, None if x.labels is None else x.labels.tolist()] for s, x in splits.items()}
foreign = sorted({m.partition(".")[0] for m in sys.modules} & {"tensorflow", "keras", "torch"})
print(json.dumps({"splits": out, "foreign": foreign}))
"""


class Served(NamedTuple):
    url: str
    digest: str
    size: int
    requests: list


def _zip(path):
    labelled = {"train.tsv": TRAIN, "dev.tsv": DEV}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, rows in labelled.items():
            lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
            archive.writestr(f"SST-2/{name}", "\n".join(lines) + "\n")
        lines = ["index\tsentence", *(f"{i}\t{text}" for i, text in enumerate(TEST))]
        archive.writestr("SST-2/test.tsv", "\n".join(lines) + "\n")
    return path


@contextlib.contextmanager
def _serve(directory):
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        timeout = 10

        def __init__(self, *args):
            super().__init__(*args, directory=str(directory))

        def log_message(self, *args):
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requests
        finally:
            server.shutdown()
            thread.join(timeout=10)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    data = _zip(directory / "SST-2.zip").read_bytes()
    with _serve(directory) as (url, requests):
        yield Served(f"{url}/SST-2.zip", hashlib.sha256(data).hexdigest(), len(data), requests)


def _run(script, *args):
    env = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def prepared(served, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    run = _run(PREPARE, served.url, served.digest, served.size, data_dir, "array_record")
    assert run.returncode == 0, run.stderr
    assert served.requests.count("/SST-2.zip") == 1
    return data_dir


@pytest.mark.slow
@needs_tensorflow
def test_prepared_data_are_read_without_tensorflow(prepared):
    run = _run(READ, prepared)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["foreign"] == []
    assert result["splits"] == {
        "train": [[text for text, _ in TRAIN], [label for _, label in TRAIN]],
        "validation": [[text for text, _ in DEV], [label for _, label in DEV]],
        "test": [TEST, None],
    }


@needs_tensorflow
def test_the_data_are_array_record_files(prepared):
    names = [path.name for path in (prepared / "glue" / "sst2").rglob("*") if path.is_file()]
    assert sum(".array_record" in name for name in names) == 3
    assert not any(".tfrecord" in name for name in names)


@needs_tensorflow
def test_a_file_whose_checksum_is_wrong_is_refused(served, tmp_path):
    run = _run(PREPARE, served.url, "0" * 64, served.size, tmp_path, "array_record")
    assert run.returncode != 0
    assert "NonMatchingChecksumError" in run.stderr
    assert "source 'tfds:glue/sst2' could not be prepared here" in run.stderr
    assert not list(tmp_path.rglob("*.array_record*"))


@needs_tensorflow
@pytest.mark.slow
def test_data_that_were_prepared_in_another_format_are_refused(served, tmp_path):
    run = _run(PREPARE, served.url, served.digest, served.size, tmp_path, "tfrecord")
    assert run.returncode != 0
    assert f"{tmp_path}/glue/sst2/2.0.0 are not array_record files" in run.stderr
    assert "give another data_dir" in run.stderr


def test_the_address_tfds_has_is_that_of_sst2():
    """What the scripts above replace: should TFDS rename it, they would test nothing."""
    from tensorflow_datasets.text import glue

    (config,) = (c for c in glue.Glue.BUILDER_CONFIGS if c.name == "sst2")
    assert config.data_url.endswith("/SST-2.zip")
    assert config.data_url in glue.Glue.url_infos
