"""The choice of a dtype: by measurement, kept for a run that goes on, and refused where it can't be."""

import json

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from lora_jax.models import fast_dtype
from lora_jax.models.fast_dtype import Choice
from lora_jax.tasks import from_config


@pytest.fixture
def measured(monkeypatch):
    """Replaces the two times that are measured, in the order float32, bfloat16."""

    def replace(wide, narrow):
        times = iter([wide, narrow] * 100)
        monkeypatch.setattr(fast_dtype, "_measure", lambda run: next(times))
        fast_dtype.choose.cache_clear()

    yield replace
    fast_dtype.choose.cache_clear()


@pytest.mark.parametrize(
    ("wide", "narrow", "dtype"),
    [(2.0, 1.0, "bfloat16"), (1.2, 1.0, "float32"), (1.0, 1.0, "float32"), (1.0, 3.0, "float32")],
)
def test_bfloat16_must_be_clearly_faster(measured, wide, narrow, dtype):
    measured(wide, narrow)
    choice = fast_dtype.choose()
    assert choice == Choice(dtype, wide / narrow)
    assert dtype in choice.describe() and f"{wide / narrow:.1f} times" in choice.describe()
    assert from_config.dtype("auto") == jnp.dtype(dtype)


def test_a_real_measurement():
    choice = fast_dtype.choose()
    assert choice.dtype in ("float32", "bfloat16") and choice.gain > 0


def config(dtype):
    return ConfigDict({"model": {"dtype": dtype}}).lock()


def test_a_new_run_settles_it(measured, tmp_path):
    measured(2.0, 1.0)
    settled = config("auto")
    assert "2.0 times as fast" in from_config.settle_dtype(settled, tmp_path / "config.json")
    assert settled.model.dtype == "bfloat16" and settled.is_locked


@pytest.mark.parametrize("stored", [{"model": {"dtype": "float32"}},
                                    {"config": {"model": {"dtype": "float32"}}}])  # fmt: skip
def test_a_run_goes_on_as_it_began(measured, tmp_path, stored):
    """On another machine, say, where the other one would be chosen."""
    measured(2.0, 1.0)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    settled = config("auto")
    assert "as before" in from_config.settle_dtype(settled, tmp_path / "config.json")
    assert settled.model.dtype == "float32"


def test_what_a_file_leaves_open_stays_open(measured, tmp_path):
    """The configs of a run and of its continuation must be equal."""
    measured(2.0, 1.0)
    (tmp_path / "config.json").write_text('{"model": {"dtype": "auto"}}')
    settled = config("auto")
    assert "2.0 times as fast" in from_config.settle_dtype(settled, tmp_path / "config.json")
    assert settled.model.dtype == "auto"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": 3}', '{"model": {"dtype": "float8"}}'])
def test_a_damaged_file_is_for_others_to_tell(measured, tmp_path, text):
    measured(1.0, 1.0)
    (tmp_path / "config.json").write_text(text)
    settled = config("auto")
    assert from_config.settle_dtype(settled, tmp_path / "config.json")
    assert settled.model.dtype == "float32"


def test_what_is_set_stays(measured, tmp_path):
    measured(2.0, 1.0)
    settled = config("float32")
    assert not from_config.settle_dtype(settled, tmp_path / "config.json")
    assert settled.model.dtype == "float32"


def test_weights_have_no_auto():
    with pytest.raises(ValueError, match=r"model.param_dtype must be one of .*float32.*got 'auto'"):
        from_config.dtype("auto", "param_dtype")
    with pytest.raises(ValueError, match=r"model.dtype must be one of .*'auto'\], got 'half'"):
        from_config.dtype("half")
