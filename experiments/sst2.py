r"""Fine-tunes BERT for sentence classification.

    python -m experiments.sst2 --config=configs/quickstart.py --workdir=runs/quickstart \
        --config.lora.rank=4

Run again with the same config, it goes on where it stopped.
"""

import logging
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments import classification, cli, train, workdirs

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Trains, and says what to do next."""
    if argv:
        raise ValueError(f"Unexpected arguments {argv}; options start with --.")
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    logging.getLogger("lora_jax").setLevel(logging.ERROR)  # the report says what is fresh
    classification.check(config)
    workdirs.check(workdir, config)
    task = classification.make_task(config)
    best = train.train(task, config, classification.lora_config(config), workdir)
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


if __name__ == "__main__":
    cli.run(main)
