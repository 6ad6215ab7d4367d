"""DistilBERT against transformers and PEFT, live."""

import numpy as np
import pytest

import lora_jax as lora
from lora_jax.tasks import adapter_files
from tests.helpers import family_parity

transformers = family_parity.transformers

pytestmark = pytest.mark.parity


def random_config(seed):
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 5))
    return transformers.DistilBertConfig(
        vocab_size=int(rng.integers(20, 60)),
        dim=heads * int(rng.integers(3, 9)),
        n_layers=int(rng.integers(1, 4)),
        n_heads=heads,
        hidden_dim=int(rng.integers(5, 50)),
        activation=str(rng.choice(["gelu", "relu", "gelu_new"])),
        max_position_embeddings=int(rng.integers(9, 20)),
        sinusoidal_pos_embds=bool(rng.integers(2)),
        num_labels=3,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    )


def random_inputs(config, seed):
    labels = np.random.default_rng(seed).integers(0, 3, 4)
    return family_parity.padded_ids(config.vocab_size, seed, left=seed % 2 == 1) | {
        "labels": labels
    }


CASE = family_parity.Case(
    head="classifier",
    model=transformers.DistilBertForSequenceClassification,
    config=random_config,
    inputs=random_inputs,
    targets=("q_lin", "v_lin"),
)


@pytest.mark.supports("DistilBERT", "logits")
@pytest.mark.parametrize("seed", range(8))
def test_logits_of_random_models(seed, tmp_path):
    family_parity.check_logits(CASE, seed, tmp_path, scan_layers=seed % 4 == 3)


@pytest.mark.supports("DistilBERT", "training")
def test_50_steps(tmp_path):
    family_parity.check_training(CASE, tmp_path)


# PEFT itself can't take "all-linear" here: it would adapt pre_classifier, which it also saves.
LAYERS = ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")


@pytest.mark.supports("DistilBERT", "PEFT round trip")
@pytest.mark.parametrize("targets", [("q_lin", "v_lin"), LAYERS])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_peft_round_trip(targets, scan_layers, tmp_path):
    family_parity.check_peft(CASE._replace(targets=targets), 1, tmp_path, scan_layers=scan_layers)


@pytest.mark.supports("DistilBERT", "merged export")
@pytest.mark.parametrize("scan_layers", [False, True])
def test_transformers_opens_merged_weights(scan_layers, tmp_path):
    auto = transformers.AutoModelForSequenceClassification
    family_parity.check_merged_export(CASE, 2, tmp_path, auto=auto, scan_layers=scan_layers)


def test_a_directory_of_the_programs_opens_in_peft(tmp_path):
    """With the whole head; with its last layer alone, PEFT would train the first one, too."""
    model = family_parity.torch_model(CASE, 3)
    model.save_pretrained(tmp_path / "base")
    loaded = family_parity.load(CASE, tmp_path / "base")
    inputs = CASE.inputs(model.config, 3)
    settings = {"rank": 2, "alpha": 4.0, "targets": loaded.family.targets}
    made = lambda train: family_parity.random_adapter(
        loaded.model.apply, loaded.params, inputs, train=train, **settings
    )
    save = lambda adapter, train: adapter_files.save_peft(
        tmp_path / "out", loaded, adapter, lora.LoRAConfig(train=train, **settings), base="x"
    )
    with pytest.raises(ValueError, match="pre_classifier"):
        save(made(("classifier",)), ("classifier",))
    adapter = made(loaded.family.trained)
    save(adapter, loaded.family.trained)
    opened = family_parity.opened_by_peft(family_parity.torch_model(CASE, 3), tmp_path / "out")
    lifted = lora.lift(loaded.model.apply)
    ours = family_parity.our_logits(lifted, lora.bind(loaded.params, adapter), inputs)
    family_parity.assert_same_logits(ours, family_parity.torch_logits(opened, inputs), inputs)
