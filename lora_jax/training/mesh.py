"""The devices of a run: the mesh that its config describes.

Rows of a batch are split over the axes ``data`` and ``fsdp``, the base by the table of its family,
and the adapter and the optimizer's state like the base. The compiler (GSPMD) turns the step for one
device into the step for all. With a mesh of a single device no array is placed at all.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lora_jax import sharding

PyTree = Any


class Devices(NamedTuple):
    """The devices of a run.

    Attributes:
      mesh: mesh with the axes of :data:`lora_jax.sharding.AXES`; None for JAX's default device.
      pmap: whether the step is a ``jax.pmap`` over the mesh, of which only the axis ``data`` is
        longer than 1.
    """

    mesh: Mesh | None = None
    pmap: bool = False


ONE = Devices()


def list_problems(config: ConfigDict) -> list[str]:
    """Says what is wrong with ``mesh`` and ``pmap`` in a config, for the devices that there are."""
    problems = [*_size_problems(config)] or [*_pmap_problems(config)]
    return problems or _device_problems(config) + _row_problems(config)


def _size_problems(config: ConfigDict) -> Iterator[str]:
    for name in sharding.AXES:
        size, may_fill = config.mesh[name], name == sharding.DATA
        is_whole = isinstance(size, int) and not isinstance(size, bool)
        if not is_whole or size < 1 and not (may_fill and size == -1):
            alternative = ", or -1" if may_fill else ""
            yield f"mesh.{name} must be a whole number of at least 1{alternative}, got {size}"


def _pmap_problems(config: ConfigDict) -> Iterator[str]:
    fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
    if config.pmap and fsdp * tensor > 1:
        yield (
            f"pmap splits the rows of a batch alone, and mesh.fsdp is {fsdp}, mesh.tensor "
            f"{tensor}: set them to 1, or pmap to False"
        )
    if config.pmap and jax.process_count() > 1:
        yield "pmap is for one process: set it to False, and mesh.data to -1"


def _device_problems(config: ConfigDict) -> list[str]:
    shape, count = _shape(config), jax.device_count()
    axes = " x ".join(f"{name} {size}" for name, size in zip(sharding.AXES, shape, strict=True))
    if not _fits(shape):
        needed = math.prod(max(size, 1) for size in shape)
        return [f"the mesh needs {needed} devices or more ({axes}), and there are {count}"]
    if jax.process_count() > 1 and math.prod(shape) < count:
        return [
            f"the {jax.process_count()} processes have {count} devices, and the mesh has "
            f"{math.prod(shape)} ({axes}): all must be used, so set mesh.data to -1"
        ]
    return []


def _fits(shape: tuple[int, int, int]) -> bool:
    return 0 not in shape and math.prod(shape) <= jax.device_count()


def _row_problems(config: ConfigDict) -> list[str]:
    shape, problems = _shape(config), list[str]()
    if not _fits(shape):
        return problems
    rows = {
        f"batch_size {config.batch_size}": (config.batch_size, config.accumulate),
        f"eval_batch_size {config.eval_batch_size}": (config.eval_batch_size, 1),
    }
    for field, (size, parts) in rows.items():
        # Less than one part is a mistake that the check of the field names.
        if size % (shape[0] * shape[1] * max(parts, 1)):
            of_parts = f", of each of its {parts} parts (accumulate)" if parts > 1 else ""
            problems.append(
                f"{field} must be a multiple of mesh.data x mesh.fsdp, {shape[0]} x {shape[1]}, "
                f"over which the rows{of_parts} are split"
            )
    return problems


def _shape(config: ConfigDict) -> tuple[int, int, int]:
    data, fsdp, tensor = (config.mesh[name] for name in sharding.AXES)
    if data == -1 or (config.pmap and data == 1):
        data = jax.device_count() // (fsdp * tensor)
    return data, fsdp, tensor


def check(config: ConfigDict) -> None:
    """Checks the fields ``mesh`` and ``pmap``.

    Raises:
      ValueError: names all that is wrong.
    """
    if problems := list_problems(config):
        raise ValueError(f"The config is wrong: {'; '.join(problems)}.")


def find(config: ConfigDict) -> Devices:
    """Finds the devices that a config describes.

    Raises:
      ValueError: as :func:`check`.
    """
    check(config)
    shape = _shape(config)
    if math.prod(shape) == 1:
        return ONE
    # In an order in which neighbours on the mesh are neighbours on the machine.
    devices = mesh_utils.create_device_mesh(shape, jax.devices()[: math.prod(shape)])
    return Devices(Mesh(devices, sharding.AXES), config.pmap)


def base_mesh(devices: Devices) -> Mesh | None:
    """Returns the mesh over which the base is split while it is loaded, if there is one."""
    return None if devices.pmap else devices.mesh


def require_mesh(devices: Devices) -> Mesh:
    """Returns the mesh of devices that are one.

    Raises:
      ValueError: there is a single device.
    """
    if devices.mesh is None:
        raise ValueError("These devices are no mesh: there is one, and nothing to split.")
    return devices.mesh
