"""Runnable experiments built on :mod:`lora_jax`; nothing in the library imports them."""
