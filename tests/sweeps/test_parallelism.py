"""How many runs go at a time: evenly, as fast as measured, and fewer when memory runs out."""

import jax
import pytest

from configs import common
from experiments import recipes
from lora_jax.sweeps import parallelism, scheduler, sweep_dirs, vmapped_step
from lora_jax.sweeps.parallelism import Programs
from tests.helpers import runs_together

root = runs_together.root  # the same tiny model and data


@pytest.fixture(scope="module")
def found(root):
    values = common.product({"lora.rank": (1, 3), "seed": (0, 1)})
    return runs_together.add_points(root, values, epochs=1, data__train_examples=32)


@pytest.mark.parametrize("parallel, runs, width", [(16, 17, 9), (5, 12, 4), (3, 2, 2), (1, 9, 1)])
def test_cohorts_are_even_and_keep_their_width(parallel, runs, width):
    made = Programs(parallel)
    points = list(range(runs))
    assert made.width(None, "key", points, 100) == width
    assert made.width(None, "key", points[width:] or points, 100) == width  # no new compilation
    made.forget()
    assert made.width(None, "key", points[:1], 100) == 1


def test_out_of_memory_halves_the_width():
    made = Programs(8)
    assert made.width(None, "key", range(8), 100) == 8
    made.narrow("key", 8, MemoryError())
    assert made.width(None, "key", range(8), 100) == 4
    with pytest.raises(ValueError, match="Not even one run"):
        made.narrow("key", 1, MemoryError())
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        parallelism.check_memory(jax.errors.JaxRuntimeError("INTERNAL: something else"))


@pytest.mark.slow
def test_the_width_is_measured(found):
    """With all the time in the world a second width is tried; with little, one is compiled."""
    group = scheduler.prepare(recipes.GLUE, found, found)
    made = Programs(None)
    assert made.width(group, "short", found, steps=4) == 1
    assert made.compilations() == {"train": 1}
    assert made.width(group, "long", found, steps=10**9) in (1, 4)
    assert made.compilations() == {"train": 3}  # of another key: one run, and four, at a time


@pytest.mark.slow
def test_a_sweep_goes_on_when_memory_runs_out(found, tmp_path, monkeypatch):
    """A device that has no room for more than one run, as of the third step."""
    steps = {"full": 0, "fits": 0}
    call = vmapped_step.call

    def limited(on, name, members, base, batch):
        kind = "full" if on.count > 1 else "fits"
        steps[kind] += name == "train"
        if kind == "full" and steps[kind] >= 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")
        return call(on, name, members, base, batch)

    monkeypatch.setattr(vmapped_step, "call", limited)
    sweep = scheduler.Sweep(
        trials=found,
        local_trials=found,
        recipe=recipes.GLUE,
        workdir=tmp_path / "sweep",
        parallel=4,
    )
    compiled = scheduler.run(sweep, found[0].config)
    assert steps == {"full": 4, "fits": 4 * 4}  # four, then two at a time; then each its four steps
    assert compiled["train"] == 2  # two at a time was refused before it was compiled
    results = [sweep_dirs.read_result(tmp_path / "sweep", p) for p in found]
    assert [(r["status"], r["steps"]) for r in results] == [("finished", 4)] * 4
