"""The benchmark of a language model's step: the memory of its program at full size, and its steps."""

import pytest

from benchmarks.llama_steps import Case, measure_memory, ours


def measure(model, batch, base):
    return measure_memory(Case(model=model, batch=batch, base=base))


@pytest.mark.slow
@pytest.mark.parametrize(("length", "most"), [(4096, 12.0), (8192, 16.0)])
def test_a_model_of_8_billion_in_4_bits(length, most):
    found = measure("8b", (1, length), "nf4")
    assert found["kernels"] == 7_504_658_432
    assert found["total_gb"] <= most


@pytest.mark.slow
def test_steps_of_the_benchmark_learn_what_they_are_given():
    found = ours(Case(model="tiny", batch=(1, 64), base="nf4", texts=2), 1)
    assert 6.1 < found["loss"] < 6.5  # near log(512), as of random tokens
    assert found["tokens_per_s"] > 0
