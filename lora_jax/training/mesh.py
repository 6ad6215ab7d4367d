"""The devices of a run: the mesh that its config describes.

Rows of a batch are split over the axes ``data`` and ``fsdp``; the base by its family's table; the
adapter and the optimiser's state as the base. The compiler (GSPMD) makes of the step for one device
the one for all. On a mesh of one device nothing is touched at all.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lora_jax import sharding

PyTree = Any


class Devices(NamedTuple):
    """Where a run takes place.

    Attributes:
      mesh: of the axes of :data:`lora_jax.sharding.AXES`; None for JAX's default device.
      pmap: whether the step is a ``jax.pmap`` over the mesh, whose only long axis is ``data``.
    """

    mesh: Mesh | None = None
    pmap: bool = False


ONE = Devices()


def list_problems(config: ConfigDict) -> list[str]:
    """Says what is wrong with ``mesh`` and ``pmap`` in a config, for the devices that there are."""
    sizes = {f"mesh.{name}": config.mesh[name] for name in sharding.AXES}
    found = [
        f"{field} must be a whole number of at least 1{', or -1' if least < 1 else ''}, got {size}"
        for (field, size), least in zip(sizes.items(), (-1, 1, 1), strict=True)
        if not _whole(size) or size < least or size == 0
    ]
    if found:
        return found
    data, *others = sizes.values()
    if config.pmap and math.prod(others) > 1:
        found.append(
            f"pmap splits the rows of a batch alone, and mesh.fsdp is {others[0]}, mesh.tensor "
            f"{others[1]}: set them to 1, or pmap to False"
        )
    if config.pmap and jax.process_count() > 1:
        found.append("pmap is for one process: set it to False, and mesh.data to -1")
    return found or _misfits(config)


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _misfits(config: ConfigDict) -> list[str]:
    shape, there = _shape(config), jax.device_count()
    said = " x ".join(f"{name} {size}" for name, size in zip(sharding.AXES, shape, strict=True))
    if 0 in shape or math.prod(shape) > there:
        needed = math.prod(max(size, 1) for size in shape)
        return [f"the mesh needs {needed} devices or more ({said}), and there are {there}"]
    found = []
    if jax.process_count() > 1 and math.prod(shape) < there:
        found.append(
            f"the {jax.process_count()} processes have {there} devices, and the mesh has "
            f"{math.prod(shape)} ({said}): all must be used, so set mesh.data to -1"
        )
    rows = {
        f"batch_size {config.batch_size}": (config.batch_size, config.accumulate),
        f"eval_batch_size {config.eval_batch_size}": (config.eval_batch_size, 1),
    }
    for said, (size, parts) in rows.items():
        # Less than one part is a mistake that the check of the field names.
        if size % (shape[0] * shape[1] * max(parts, 1)):
            of_parts = f", of each of its {parts} parts (accumulate)" if parts > 1 else ""
            found.append(
                f"{said} must be a multiple of mesh.data x mesh.fsdp, {shape[0]} x {shape[1]}, "
                f"over which the rows{of_parts} are split"
            )
    return found


def _shape(config: ConfigDict) -> tuple[int, int, int]:
    data, fsdp, tensor = (config.mesh[name] for name in sharding.AXES)
    if data == -1 or (config.pmap and data == 1):
        data = jax.device_count() // (fsdp * tensor)
    return data, fsdp, tensor


def check(config: ConfigDict) -> None:
    """Finds mistakes in the mesh.

    Raises:
      ValueError: all of them.
    """
    if found := list_problems(config):
        raise ValueError(f"The config is wrong: {'; '.join(found)}.")


def find(config: ConfigDict) -> Devices:
    """The devices that a config describes.

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
