"""Plots of the reports."""

import base64
import io
from typing import Any


def new_axes(x_label: str, y_label: str) -> Any:
    """Empty axes in a figure of their own."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    axes = Figure(figsize=(5, 3.6), layout="constrained").add_subplot()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    return axes


def image(axes: Any) -> str:
    """The figure as a PNG in base64, with a legend if anything has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    content = io.BytesIO()
    axes.figure.savefig(content, format="png", dpi=120)
    return base64.b64encode(content.getvalue()).decode()
