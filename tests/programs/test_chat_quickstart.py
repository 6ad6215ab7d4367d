"""``make chat-quickstart`` for real, where SmolLM2 is installed: what it learns can be seen."""

import re
import shlex

import pytest

from lora_jax.data import tutor
from lora_jax.models import checkpoints
from tests.helpers.places import ROOT
from tests.helpers.programs import start

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chat_quickstart")]
QUESTIONS = re.search(r"^QUESTIONS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
QUESTIONS = shlex.split(QUESTIONS)
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def run(*arguments):
    # Optimized, as a user runs it.
    done = start(*arguments, timeout=1800, env={"XLA_FLAGS": "", "COLUMNS": "100"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run's directory, and what the program prints."""
    try:
        checkpoints.resolve(MODEL)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    workdir = tmp_path_factory.mktemp("chat_quickstart")
    out = run("instruct", "--config=configs/chat_quickstart.py", f"--workdir={workdir}")
    return workdir, out


def answers(text):
    """The replies that ``--ask`` prints below the questions."""
    return [block.partition("\n")[2] for block in text.strip().split("\n\n> ")]


def test_losses_fall_and_replies_take_the_form(trained):
    _, out = trained
    before, after = re.search(
        r"before training ([\d.]+), best validation loss ([\d.]+)", out
    ).groups()
    assert float(after) < float(before) - 1.0
    counts = re.search(r"(\d+) of 50 before, (\d+) of 50 after", out).groups()
    assert int(counts[0]) <= 1 and int(counts[1]) >= 45


def test_the_two_questions(trained):
    workdir, _ = trained
    replies = answers(run("chat", f"--adapter={workdir / 'adapter'}", *QUESTIONS))
    assert all(re.fullmatch(tutor.PATTERN, reply) for reply in replies) and len(replies) == 2
    before = answers(run("chat", f"--model={MODEL}", *QUESTIONS))
    assert not any(re.fullmatch(tutor.PATTERN, reply) for reply in before)


def test_merged_and_exported_it_replies_the_same(trained, tmp_path):
    workdir, _ = trained
    adapter = f"--adapter={workdir / 'adapter'}"
    replies = run("chat", adapter, *QUESTIONS)
    run("export", adapter, f"--out={tmp_path / 'merged'}", "--merged")
    assert run("chat", f"--model={tmp_path / 'merged'}", *QUESTIONS) == replies
    run("export", adapter, f"--out={tmp_path / 'peft'}", "--peft")
    assert run("chat", f"--adapter={tmp_path / 'peft'}", *QUESTIONS) == replies
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    question = next(x for x in QUESTIONS if x.startswith("--ask=")).removeprefix("--ask=")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    out = model.generate(**prompt, max_new_tokens=80, do_sample=False)
    new = out[0, prompt["input_ids"].shape[1] :]
    theirs = tokenizer.decode(new, skip_special_tokens=True).strip()
    assert theirs == answers(replies)[0]
