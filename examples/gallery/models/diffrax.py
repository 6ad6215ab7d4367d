"""diffrax: differential equations whose right-hand side is a network."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from examples.gallery import bridges
from examples.gallery.model import Library, Model

LIBRARY = Library("diffrax")


@LIBRARY.model("neural ODE (Tsit5, PIDController, RecursiveCheckpointAdjoint)")
def ode(batch: int) -> Model:
    """The solver has a derivative rule of its own, around all uses of the kernels."""
    params, static = eqx.partition(
        eqx.nn.MLP(8, 8, width_size=32, depth=2, activation=jnp.tanh, key=jax.random.key(0)),
        eqx.is_inexact_array,
    )

    def solve(params: eqx.nn.MLP, start: jax.Array) -> jax.Array:
        field = diffrax.ODETerm(lambda t, y, params: eqx.combine(params, static)(y))
        control = diffrax.PIDController(rtol=1e-3, atol=1e-3)
        return diffrax.diffeqsolve(
            field, diffrax.Tsit5(), 0.0, 1.0, 0.1, start, params, stepsize_controller=control
        ).ys[-1]

    fn = lambda params, starts: jax.vmap(solve, (None, 0))(params, starts)
    return Model(fn=fn, params=params, args=(bridges.normal(batch, 8),), lines=9)


class Field(eqx.Module):
    """A field whose values are matrices."""

    mlp: eqx.nn.MLP

    def __call__(self, t: jax.Array, y: jax.Array, _: None) -> jax.Array:
        return jnp.tanh(self.mlp(y)).reshape(8, 3)


class Cde(eqx.Module):
    """A neural controlled differential equation, as in diffrax's documentation."""

    initial: eqx.nn.Linear
    field: Field
    readout: eqx.nn.Linear

    def __call__(self, times: jax.Array, path: jax.Array) -> jax.Array:
        coefficients = diffrax.backward_hermite_coefficients(times, path)
        control = diffrax.CubicInterpolation(times, coefficients)
        term = diffrax.ControlTerm(self.field, control).to_ode()
        start = self.initial(control.evaluate(times[0]))
        solution = diffrax.diffeqsolve(term, diffrax.Heun(), times[0], times[-1], 0.1, start)
        return self.readout(solution.ys[-1])


@LIBRARY.model("neural CDE (the module is the field)")
def cde(batch: int) -> Model:
    """The kernels of the field are in the solver, the others outside of it."""
    keys = jax.random.split(jax.random.key(0), 3)
    field = Field(eqx.nn.MLP(8, 24, width_size=16, depth=1, key=keys[1]))
    model = Cde(eqx.nn.Linear(3, 8, key=keys[0]), field, eqx.nn.Linear(8, 8, key=keys[2]))
    times = jnp.broadcast_to(jnp.linspace(0.0, 1.0, 8), (batch, 8))
    return bridges.equinox(model, times, bridges.normal(batch, 8, 3))
