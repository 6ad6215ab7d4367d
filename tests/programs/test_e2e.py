"""E2E: data, scores, and the whole path from nothing to an adapted model that writes."""

import collections
import json
import math

import jax
import numpy as np
import pytest

from configs import e2e_tiny, gpt2_medium_e2e
from lora_jax.data import e2e_nlg
from lora_jax.models import checkpoints
from lora_jax.tasks import adapter_files, e2e, language_model
from tests.helpers import e2e_files, programs
from tests.helpers.places import ROOT

pytestmark = pytest.mark.xdist_group("e2e")
REAL = ROOT.parent / "shared"
nlg_scores = pytest.importorskip("lora_jax.tasks.text_metrics")
sacrebleu = pytest.importorskip("sacrebleu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("e2e")
    for part in ("train", "test"):
        (folder / f"{part}.txt").write_text("\n".join(e2e_files.lines(part)) + "\n")
    return folder


# --- Data


def test_lines_become_pairs(source):
    pairs = e2e_nlg.read(str(source), "test.txt")
    assert pairs.meanings[0] == "name : Bento | food : soup"
    assert pairs.texts[:2] == ("Bento serves soup .", "You can eat soup at Bento .")
    assert [len(x) for x in e2e_nlg.group_references(pairs).values()] == [2, 2, 2]


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_meanings_are_in_one_part_alone(source, seed):
    pairs = e2e_nlg.read(str(source), "train.txt")
    one, two = e2e_nlg.split(pairs, 3, seed)
    assert not set(one.meanings) & set(two.meanings) and len(set(two.meanings)) == 3
    assert sorted(one.texts + two.texts) == sorted(pairs.texts)
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"data.holdout is {count}, and there are 9"):
            e2e_nlg.split(pairs, count, seed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a||b\n\na\nb||c||d\n", r"lines \[3, 4\] are not"),
        (b"a||  \n", r"lines \[1\] are not"),
        (b"\n", "there are no lines"),
        (b"\xff||b\n", "not UTF-8"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        e2e_nlg.read(str(tmp_path), "x.txt")


def test_missing_files(tmp_path):
    for folder in ("", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="there is no file 'train.txt'"):
            e2e_nlg.read(folder, "train.txt")


# --- Scores


def bleu_by_hand(texts, references):
    """Papineni et al. 2002, of words that are parted by spaces."""
    grams = lambda words, n: collections.Counter(zip(*(words[k:] for k in range(n)), strict=False))
    right, total, length, nearest = [0] * 4, [0] * 4, 0, 0
    for text, some in zip(texts, references, strict=True):
        words, some = text.split(), [r.split() for r in some]
        length += len(words)
        nearest += min((abs(len(r) - len(words)), len(r)) for r in some)[1]
        for n in range(4):
            found = grams(words, n + 1)
            most = collections.Counter()
            for r in some:
                most |= grams(r, n + 1)
            right[n] += sum((found & most).values())
            total[n] += sum(found.values())
    precision = sum(math.log(a / b) for a, b in zip(right, total, strict=True)) / 4
    return 100 * math.exp(min(0.0, 1 - nearest / length) + precision)


TEXTS = ["the cat sat on the mat today", "a dog ran over the wide green hill ."]
REFERENCES = [
    ["the cat sat on a mat", "today the cat sat on the mat", "there was a cat"],
    ["a dog ran over the hill .", ],
]  # fmt: skip


def test_bleu_is_that_of_the_paper_and_every_reference_counts():
    scores = nlg_scores.bleu_and_chrf(TEXTS, REFERENCES)
    assert scores["bleu"] == pytest.approx(bleu_by_hand(TEXTS, REFERENCES), abs=1e-6)
    fewer = nlg_scores.bleu_and_chrf(TEXTS, [some[:1] for some in REFERENCES])
    assert all(fewer[name] < scores[name] < 100 for name in ("bleu", "chrf"))
    perfect = nlg_scores.bleu_and_chrf([some[-1] for some in REFERENCES], REFERENCES)
    assert perfect == pytest.approx({"bleu": 100.0, "chrf": 100.0})


def test_scores_need_references():
    for texts, references in ((["a"], [[]]), (["a"], []), ([], [])):
        with pytest.raises(ValueError, match="one list for each text"):
            nlg_scores.bleu_and_chrf(texts, references)


# --- Programs


run = programs.run


def flags(fields):
    return [f"--config.{name}={value}" for name, value in fields.items()]


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """The workdir of a run on a base that was made from nothing, and what it printed."""
    root = tmp_path_factory.mktemp("runs")
    done = run(
        "pretrain",
        "--config=configs/e2e_tiny_base.py",
        f"--workdir={root}/base",
        *flags(e2e_files.BASE | {"data.source": source}),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trainable%: 100.0000" in done.stdout
    arguments = [
        "e2e_nlg", "--config=configs/e2e_tiny.py", f"--workdir={root}/run",
        *flags(e2e_files.ADAPTED | {"data.source": source, "model.name": root / "base" / "model"}),
    ]  # fmt: skip
    done = programs.start(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, arguments, done.stdout


def config_of(finished, source, **changes):
    c = e2e_tiny.get_config().unlock()
    c.update_from_flattened_dict(
        {k: v for k, v in e2e_files.ADAPTED.items() if k != "data.buckets"}
    )
    c.data.buckets, c.data.source, c.model.name = (
        (48,),
        str(source),
        str(finished[0] / "base" / "model"),
    )
    c.update_from_flattened_dict(changes)
    return c.lock()


@pytest.mark.slow
def test_the_base_learns_and_is_a_model_like_any_other(finished):
    lines = (finished[0] / "base" / "metrics.jsonl").read_text().splitlines()
    losses = [x["eval_loss"] for x in map(json.loads, lines) if "eval_loss" in x]
    assert losses[-1] < losses[0] < math.log(330) + 0.5
    folder = finished[0] / "base" / "model"
    loaded = checkpoints.load(folder, head="causal-lm")
    assert loaded.fresh == () and loaded.model.config.n_embd == 24
    start = checkpoints.load(finished[0] / "base" / "start", head="causal-lm")
    moved = [np.abs(a - b).max() for a, b in zip(leaves(start), leaves(loaded), strict=True)]
    assert min(moved) > 0  # every one of them is trained


def leaves(loaded):
    return [np.asarray(x) for x in jax.tree.leaves(loaded.params)]


@pytest.mark.slow
def test_adaptation_improves_what_is_written(finished):
    root, _, out = finished
    scores = json.loads((root / "run" / "scores.json").read_text())
    assert scores["adapted"]["bleu"] > scores["unadapted"]["bleu"] + 5
    assert scores["adapted"]["chrf"] > scores["unadapted"]["chrf"]
    assert f"adapted: bleu {scores['adapted']['bleu']:.2f}" in out
    texts = [json.loads(x) for x in (root / "run" / "texts.jsonl").read_text().splitlines()]
    assert [x["meaning"] for x in texts] == [
        "name : Bento | food : soup", "name : Cora | food : rice", "name : Dado | food : cake"
    ]  # fmt: skip
    assert "lora.rank" not in out and "adapted with rank 8" in out


@pytest.mark.slow
def test_files_give_the_scores_of_the_run(finished, source, tmp_path):
    """The adapter as it is, through PEFT's format, and merged into a model of its own."""
    root = finished[0]
    scores = json.loads((root / "run" / "scores.json").read_text())
    found = language_model.load(root / "run" / "adapter")
    assert language_model.is_language(root / "run" / "adapter")
    config = config_of(finished, source)
    adapter_files.save_peft(
        tmp_path / "peft",
        found.loaded,
        found.adapter,
        found.config,
        base=found.loaded.checkpoint.name,
    )
    words = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert words["task_type"] == "CAUSAL_LM" and language_model.is_language(tmp_path / "peft")
    out = tmp_path / "merged"
    done = run("export", f"--adapter={tmp_path / 'peft'}", f"--out={out}", "--merged")
    assert done.returncode == 0 and "AutoModelForCausalLM" in done.stdout, done.stderr[-2000:]
    config = config_of(finished, source, **{"model.name": str(out)})
    written = e2e.write(config, e2e.load(config))
    assert written.scores == pytest.approx(scores["adapted"])


@pytest.mark.slow
def test_loss_is_on_the_reference_only(finished, source):
    config = config_of(finished, source)
    writer = e2e.load(config)
    task, _ = e2e.make_task(config, writer=writer)
    batch = task.train_batch(0)
    end = writer.decoding.stop[0]
    for ids, counts, mask in zip(
        batch["input_ids"], batch["counts"], batch["attention_mask"], strict=True
    ):
        ids, counts = ids[mask > 0], counts[mask > 0]
        first = ids.tolist().index(end) + 1  # after the meaning
        assert counts.tolist() == [0] * first + [1] * (len(ids) - first)
        text = writer.tokenizer.decode(ids[first:-1].tolist())
        assert text.startswith(" ") and text.endswith(".") and ids[-1] == end
        assert writer.tokenizer.decode(ids[: first - 1].tolist()).startswith("name : ")


@pytest.mark.slow
def test_run_again_it_trains_no_more_and_writes_the_same(finished):
    root, arguments, _ = finished
    before = (root / "run" / "texts.jsonl").read_bytes()
    done = run(*arguments, "--config.decode.unadapted=True")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "This run is finished" in done.stdout
    assert (root / "run" / "texts.jsonl").read_bytes() == before


@pytest.mark.slow
def test_evaluation_alone_is_the_logged_loss(finished):
    root, arguments, _ = finished
    before = {p: p.stat().st_mtime_ns for p in (root / "run").rglob("*")}
    done = run(*arguments, "--eval_only")
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p: p.stat().st_mtime_ns for p in (root / "run").rglob("*")} == before
    found = json.loads(done.stdout.splitlines()[-1])
    lines = map(json.loads, (root / "run" / "metrics.jsonl").read_text().splitlines())
    losses = {x["step"]: x["eval_loss"] for x in lines if "eval_loss" in x}
    assert found["loss"] == losses[found["step"]] == min(losses.values())


@pytest.mark.slow
def test_the_unadapted_model_can_be_scored_alone(finished, tmp_path):
    root, arguments, _ = finished
    given = [a for a in arguments if not a.startswith("--workdir")]
    done = run(*given, f"--workdir={tmp_path}", "--evaluate")
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((root / "run" / "scores.json").read_text())
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found == {"unadapted": scores["unadapted"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode.beams": 0}, "beams must be a whole number"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"data.holdout": 0}, "there is nothing to evaluate on: set data.validation"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"data.buckets": (64, 32)}, "data.buckets must be positive lengths that ascend"),
        ({"model.dtype": "float8"}, "model.dtype must be one of"),
    ],
)
def test_mistakes_in_a_config(changes, message):
    c = e2e_tiny.get_config().unlock()
    for name, value in changes.items():
        part, _, field = name.rpartition(".")
        (c[part] if part else c)[field] = value
    with pytest.raises(ValueError, match=message):
        e2e.check(c)


def test_configs_pass_their_check():
    e2e.check(e2e_tiny.get_config())
    medium = gpt2_medium_e2e.get_config()
    e2e.check(medium)
    paper = {"batch_size": 8, "epochs": 5, "label_smoothing": 0.1}
    assert {k: medium[k] for k in paper} == paper
    assert (medium.lora.rank, medium.lora.alpha, medium.lora.dropout) == (4, 32.0, 0.1)
    assert (medium.decode.beams, medium.decode.no_repeat_ngram) == (10, 4)
    assert round(medium.optimizer.warmup * 5 * -(-42_061 // 8)) == 500


@pytest.mark.skipif(not (REAL / "e2e").is_dir(), reason="../shared/e2e is not there")
def test_real_lines_and_real_tokens():
    pairs = e2e_nlg.read(str(REAL / "e2e"), "test.txt")
    assert len(pairs.texts) == 4693 and len(e2e_nlg.group_references(pairs)) == 630
    assert pairs.meanings[0] == "name : Blue Spice | Type : coffee shop | area : city centre"
    tokenizer = e2e.read_tokenizer(REAL / "gpt2_tokenizer")
    assert tokenizer.get_vocab_size() == 50257
    assert tokenizer.encode("Hello world<|endoftext|>").ids == [15496, 995, 50256]
    for text in pairs.texts[:50]:
        assert tokenizer.decode(tokenizer.encode(f" {text}").ids) == f" {text}"


@pytest.mark.slow
def test_a_sweep_selects_the_lowest_loss(finished, source, tmp_path):
    root, *_ = finished
    fields = e2e_files.ADAPTED | {
        "data.source": str(source),
        "model.name": str(root / "base" / "model"),
    }
    fields |= {"epochs": 2, "data.buckets": (48,)}
    (tmp_path / "config.py").write_text(
        "from configs import e2e_tiny\n\n"
        "def get_config():\n"
        "    config = e2e_tiny.get_config()\n"
        f"    config.update_from_flattened_dict({fields!r})\n"
        "    return config\n\n"
        "def sweep(add):\n"
        "    for rate in (0.00001, 0.02):\n"
        "        add(**{'optimizer.learning_rate': rate})\n"
    )
    done = run(
        "sweep",
        "--program=e2e_nlg",
        f"--config={tmp_path}/config.py",
        f"--workdir={tmp_path}/sweep",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(p.read_text()) for p in (tmp_path / "sweep").glob("runs/*/result.json")]
    low, high = sorted(result["best_loss"] for result in found)
    assert low < high
    assert f"best validation loss {low:.4f}: learning_rate 0.02" in done.stdout
