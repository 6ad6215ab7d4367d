r"""Fine-tunes BERT for sentence classification.

    python -m experiments.sst2 --config=configs/quickstart.py --workdir=runs/quickstart \
        --config.lora.rank=4

Run again with the same config, it goes on where it stopped. With --adapter it starts from a trained
adapter, of this library or in PEFT's format, whose rank, targets and so on then hold.
"""

import logging
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import classification, cli, train, workdirs

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_ADAPTER = flags.DEFINE_string("adapter", None, "Directory of an adapter to go on from.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Trains, and says what to do next."""
    if argv:
        raise ValueError(f"Unexpected arguments {argv}; options start with --.")
    config, workdir = _config(), Path(_WORKDIR.value)
    logging.getLogger("lora_jax").setLevel(logging.ERROR)  # the report says what is fresh
    classification.check(config)
    if not config.adapter:  # whose settings are not known yet
        workdirs.check(workdir, config)
    task, lora_config = classification.make_task(config)
    if config.adapter:
        with config.unlocked():
            config.lora = classification.settings(lora_config)
    best = train.train(task, config, lora_config, workdir)
    print(
        f"best validation accuracy {best.best_accuracy:.4f} (loss {best.best_loss:.4f}) at step "
        f"{best.best_step}; {best.seconds / 60:.1f} minutes; "
        f"curves in {workdir / workdirs.CURVES}\n"
        "Next:\n"
        f"  python -m experiments.predict --adapter={workdir / workdirs.ADAPTER} "
        '"The movie was absolutely wonderful!"\n'
        f"  python -m experiments.export --adapter={workdir / workdirs.ADAPTER} "
        f"--out={workdir / 'merged'} --merged"
    )


def _config() -> ConfigDict:
    """The config with the adapter of the command line in it, so that the run's directory has it."""
    config = _CONFIG.value.copy_and_resolve_references()
    if _ADAPTER.value:
        config.adapter = _ADAPTER.value
    fixed = config_flags.get_override_values(flags.FLAGS["config"])
    fixed = [name for name in fixed if name.startswith("lora.") and name != "lora.dropout"]
    if config.adapter and fixed:
        raise ValueError(
            f"{', '.join(fixed)} can't be set together with an adapter to go on from, which has "
            "its own; lora.dropout can."
        )
    return config


if __name__ == "__main__":
    cli.run(main)
