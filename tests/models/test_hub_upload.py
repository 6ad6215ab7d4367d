"""Uploads to the Hub, against a server on this machine that checks what it is given."""

import re

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy

from lora_jax.models import hub_upload
from tests.helpers import hub_server

# The client's way of handing a file to its library of HTTP.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

CARD = "---\nbase_model: org/base\ntags:\n- lora\n---\n\n# größe\n"


@pytest.fixture(autouse=True)
def client(monkeypatch):
    """The client as it is where xet is not installed, and a token that may write."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    huggingface_hub.utils.disable_progress_bars()
    yield
    huggingface_hub.utils.enable_progress_bars()


@pytest.fixture(scope="module")
def served():
    with hub_server.serve() as (hub, address):
        yield hub, address


@pytest.fixture
def hub(served):
    hub, _ = served
    hub.repositories.clear(), hub.large.clear(), hub.requests.clear(), hub.fails.clear()
    return hub


@pytest.fixture
def push(served, hub):
    return lambda *arguments, **options: hub_upload.push(*arguments, endpoint=served[1], **options)


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "out"
    (folder / "inner").mkdir(parents=True)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "empty.txt").touch()
    (folder / "inner" / "größe.json").write_text('"ü"', encoding="utf-8")
    weights = {"a": np.arange(5000, dtype=np.float32)}
    safetensors.numpy.save_file(weights, folder / "adapter_model.safetensors")
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_directory_arrives_as_it_is(push, hub, exported):
    url = push(exported, "someone/adapter", message="A first one")
    assert hub.files("someone/adapter") == contents(exported)
    (commit,) = hub.repositories["someone/adapter"]["branches"]["main"]
    assert commit["message"] == "A first one" and "/someone/adapter/commit/" in url
    assert not hub.repositories["someone/adapter"]["private"]
    assert len(hub.large) == 1 and ("POST", "/verify") in hub.requests


def test_a_repository_that_exists_gets_another_commit(push, hub, exported):
    push(exported, "someone/adapter", private=True)
    (exported / "README.md").write_text(CARD + "More.\n")
    (exported / "empty.txt").unlink()
    push(exported, "someone/adapter", private=True)
    assert hub.repositories["someone/adapter"]["private"]
    assert len(hub.repositories["someone/adapter"]["branches"]["main"]) == 2
    assert hub.files("someone/adapter") == contents(exported) | {"empty.txt": b""}


def test_a_branch(push, hub, exported):
    for _ in range(2):  # the second time it is there
        push(exported, "someone/adapter", revision="v2")
        (exported / "new.txt").write_text("new")
    assert hub.files("someone/adapter") == {}
    assert hub.files("someone/adapter", "v2") == contents(exported)


def test_a_public_repository_does_not_become_private_by_itself(push, hub, exported):
    push(exported, "someone/adapter")
    with pytest.raises(ValueError, match="--private: someone/adapter exists, and is public"):
        push(exported, "someone/adapter", private=True)


@pytest.mark.parametrize("token, repo, says", [
    ("hf_unknown", "someone/adapter", r"answered 401 .*token is not valid: log in with `hf auth login`"),
    ("hf_reader", "someone/adapter", r"answered 403 \(You don't have the rights.* may not write to someone/adapter"),
    ("hf_writer", "other/adapter", r"answered 403 .*USER must be yours"),
])  # fmt: skip
def test_tokens_that_may_not_write(push, exported, monkeypatch, token, repo, says):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=says) as caught:
        push(exported, repo)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where, status, says", [
    ("/create", 409, "answered 409 .*exists already"), ("/create", 429, "answered 429 .*try again later"),
    ("/commit/main", 404, "answered 404 .*check USER and NAME"), ("/verify", 400, "answered 400"),
    ("/create", 418, r"answered 418 \(asked to fail\)\."),
])  # fmt: skip
def test_answers_of_the_server(push, hub, exported, where, status, says):
    hub.fails[where] = status
    with pytest.raises(ValueError, match=says) as caught:
        push(exported, "someone/adapter")
    assert "\n" not in str(caught.value)


def test_a_model_card_that_the_hub_refuses(push, exported):
    (exported / "README.md").write_text("---\ntags: lora\n---\n")
    with pytest.raises(ValueError, match=r'Invalid metadata in README.md. - "tags" must be list'):
        push(exported, "someone/adapter")


def test_no_network(exported, monkeypatch):
    with pytest.raises(ConnectionError, match=re.escape("http://127.0.0.1:9 can't be reached (")):
        hub_upload.push(exported, "someone/adapter", endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="offline"):
        hub_upload.push(exported, "someone/adapter", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    "repo", ["adapter", "a/b/c", "/adapter", "someone/", "some one/x", "someone/-x", "a/b..c"]
)
def test_what_is_no_repository(repo):
    with pytest.raises(ValueError, match=f"^{re.escape(repo)} is no repository of the Hub"):
        hub_upload.check(repo)


def test_there_must_be_a_token(monkeypatch, tmp_path):
    hub_upload.check("someone/adapter")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ValueError, match="There is no token for someone/adapter: log in with"):
        hub_upload.check("someone/adapter")
    (tmp_path / "token").write_text("hf_writer")
    hub_upload.check("someone/adapter")
