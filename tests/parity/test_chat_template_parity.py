"""Chat templates as transformers renders them, live."""

import numpy as np
import pytest

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")


from lora_jax.data import chat_template, conversations  # noqa: E402
from lora_jax.models import checkpoints  # noqa: E402
from tests.helpers import talks, tiny_llama  # noqa: E402

SOURCES = {name: getattr(talks, name) for name in ("LLAMA2", "THOUGHTS", "PLAIN", "MARKED")} | {
    "CHATML": tiny_llama.CHATML
}


@pytest.mark.parametrize("name", list(SOURCES))
@pytest.mark.parametrize("prompt", [False, True])
def test_the_same_text(name, prompt, tmp_path):
    folder = tiny_llama.checkpoint(tmp_path / "model", template=SOURCES[name])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = chat_template.find(checkpoints.resolve(folder))
    talk = talks.TALK[: 4 if prompt else 5]
    text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
    assert chat_template.render(ours, talk, prompt=prompt).text == text


def test_the_same_tokens_of_the_assistant(tmp_path):
    folder = tiny_llama.checkpoint(tmp_path / "model", template=talks.MARKED)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        talks.TALK, return_assistant_tokens_mask=True, return_dict=True
    )
    path = talks.rows(tmp_path / "rows.jsonl", {"messages": talks.TALK})
    checkpoint = checkpoints.resolve(folder)
    texts, _ = conversations.tokenize(
        conversations.read(path), chat_template.find(checkpoint), tiny_llama.tokenizer(),
        max_length=99, now=talks.NOW,
    )  # fmt: skip
    np.testing.assert_array_equal(texts.ids, theirs["input_ids"])
    np.testing.assert_array_equal(texts.counts, theirs["assistant_masks"])
