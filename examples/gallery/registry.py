"""All libraries of the gallery, each in a file of its own."""

import importlib
from collections.abc import Iterator

from examples.gallery.model import Entry

ENVIRONMENTS = {  # requirements-NAME.txt: the files whose libraries it brings
    "light": (
        "ablanx",
        "attnax",
        "diffrax",
        "e3nn",
        "egnn",
        "equimo",
        "flax_linen",
        "flax_nnx",
        "equinox_nn",
        "haiku",
        "jaxkan",
        "jaxonmodels",
        "jraph",
        "keras_layers",
        "mamba2",
        "nano_moe",
        "penzai",
    ),
    "heavy": ("brax", "flaxdiff", "keras_hub", "tunix"),
    "hf": ("diffusers", "transformers"),
    "py312": ("discretax", "eqx_zoo"),
}


def files(environment: str | None = None) -> tuple[str, ...]:
    """The files of an environment, or all."""
    names = ENVIRONMENTS.values() if environment is None else [ENVIRONMENTS[environment]]
    return tuple(name for group in names for name in group)


def entries(environment: str | None = None) -> Iterator[Entry]:
    """Yields the models whose libraries are installed, and says of others that they are not."""
    for name in files(environment):
        try:
            module = importlib.import_module(f"examples.gallery.models.{name}")
        except ImportError as error:
            print(f"{name}: not installed here ({error})")
            continue
        yield from module.LIBRARY.entries
