"""Finds PEFT's words for leaves that are trained in full: ``modules_to_save`` and ``bias``."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from lora_jax import names, paths
from lora_jax.names import Weight
from lora_jax.peft import adapter_tensors, target_modules
from lora_jax.peft.target_modules import Model


def make_error(problems: Sequence[str]) -> ValueError:
    """Makes the error that says why an adapter has no form in PEFT's files."""
    return ValueError(f"The adapter can't be saved in PEFT's format: {'; '.join(problems)}.")


def find_whole(trained: Mapping[str, Weight], model: Model) -> tuple[list[str], dict[str, Weight]]:
    """Finds the largest modules all of whose weights are trained, and the weights left over.

    Args:
      trained: weights that are trained in full, by tensor name.
      model: model that they are of.
    """
    whole: list[str] = []
    for m in model.modules:  # parents first
        weights_inside = adapter_tensors.module_weights(m, model)
        is_covered = any(m.startswith(f"{other}.") for other in whole)
        is_trained = all(w.hf in trained for w in weights_inside)
        if weights_inside and is_trained and not is_covered:
            whole.append(m)
    prefixes = tuple(f"{m}." for m in whole)
    rest = {n: w for n, w in trained.items() if not (prefixes and n.startswith(prefixes))}
    return whole, rest


def find_untrained_heads(heads: Iterable[str], saved: Sequence[str], model: Model) -> list[str]:
    """Finds modules that PEFT trains for a task and that are not among those trained in full."""
    is_inside = lambda m: any(f"{m}.".startswith(f"{other}.") for other in saved)
    return [m for m in target_modules.select_saved(heads, model) if not is_inside(m)]


def find_entries(saved: Sequence[str], model: Model) -> list[str]:
    """Finds entries for modules_to_save, where a name selects all names that end in it.

    Raises:
      ValueError: every name of a module selects other modules, too.
    """
    entries = {}
    for m in saved:
        fits = lambda e: set(target_modules.select_saved([e], model)) <= set(saved)
        entry = next((e for e in target_modules.suffixes(m) if fits(e)), None)
        if entry is None:
            also = [x for x in target_modules.select_saved([m], model) if x not in saved]
            raise make_error(
                [
                    f"{m} is trained in full, and PEFT would train {', '.join(also)} with it, "
                    "whose name ends in the same letters; train that as well"
                ]
            )
        entries[entry] = m
    return sorted(entries)


def choose_bias(
    rest: Mapping[str, Weight],
    trained: Collection[str],
    kernels: Collection[str],
    model: Model,
) -> str:
    """Chooses the setting of bias that stands for the weights outside whole modules.

    Args:
      rest: these weights, by tensor name.
      trained: names of all tensors that are trained in full.
      kernels: names of the adapted modules.
      model: model that they are of.

    Raises:
      ValueError: no setting stands for them.
    """
    if not rest:
        return "none"
    biases = {n for n in model.weights if n.rpartition(".")[2] == "bias"}
    if biases <= set(trained) and set(rest) <= biases:
        return "all"
    if set(rest) == {n for n in biases if names.module(n) in kernels}:
        return "lora_only"
    raise make_error(
        [
            f"{paths.listing(w.leaf for w in rest.values())} is trained in full, and PEFT trains "
            "whole modules, all biases, or the biases of the adapted modules; train the whole "
            "module, or leave it out"
        ]
    )
