r"""A search for learning rate, rank and alpha on the embedded review sentences, by Optuna.

    python -m experiments.sweep --config=configs/quickstart_search.py --workdir=runs/search \
        --points=24

needs ``pip install 'lora_jax[optuna]'``. All that is searched is data to the compiled step, so that
one compilation serves all points.
"""

from typing import TYPE_CHECKING, Any

from configs import quickstart_sweep

if TYPE_CHECKING:
    import optuna

get_config = quickstart_sweep.get_config


def search(trial: "optuna.Trial") -> dict[str, Any]:
    """Proposes a point: the fields of a run, whose names are the parameters' names."""
    rank = trial.suggest_categorical("lora.rank", (1, 2, 4, 8))
    return {
        "lora.rank": rank,
        "lora.alpha": rank * trial.suggest_float("alpha / rank", 0.5, 8.0, log=True),
        "optimizer.learning_rate": trial.suggest_float(
            "optimizer.learning_rate", 1e-4, 1e-2, log=True
        ),
    }
