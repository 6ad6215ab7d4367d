"""The gallery's page: tables of what was measured."""

from examples.gallery.measure import Row


def line(row: Row) -> str:
    """One line of a run's output, and one for each problem."""
    step0 = "yes" if not any(row.step0.values()) else f"{row.step0}"
    text = (
        f"{row.library}: {row.name}: {row.kernels} kernels, {row.factored} uses factored, "
        f"{len(row.fallbacks)} formed; step 0 {step0}; lift = merge {row.output} {row.gradient} "
        f"{row.float64}; FLOPs {row.flops}; {row.seconds:.0f} s"
    )
    for what, items in (("formed", row.fallbacks), ("unsaid", row.unsaid), ("said", row.said), ("PROBLEM", row.problems)):
        text += "".join(f"\n    {what}: {item}" for item in items)
    return text
