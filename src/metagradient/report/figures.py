"""Figures of a report: SVG that follows the reader's light or dark scheme, with a caption and a text alternative."""

from base64 import b64encode
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas

# Matplotlib knows no "currentColor": ink is drawn in this colour, which nothing else uses, and replaced in the SVG.
_INK = "#010203"
_COLOURS = ("#3d8fd1", "#e07b39", "#4aa564", "#a974c9")
_STROKES = ("-", "--", ":", "-.")
_SCHEME = "<style>svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#d7dce2}}</style>"


@dataclass(frozen=True)
class Figure:
    """A picture with its words.

    Arguments:
        content: the SVG document, UTF-8.
        caption: what it shows and how to read it.
        alt: the same for those who don't see it.
    """

    content: bytes
    caption: str
    alt: str

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return "data:image/svg+xml;base64," + b64encode(self.content).decode()


def weights_by_group(weights: np.ndarray, flipped: np.ndarray) -> Figure:
    """Histograms of the weights of examples with flipped and with clean labels.

    Arguments:
        weights: float[n].
        flipped: bool[n].
    """
    groups = {"clean label": weights[~flipped], "flipped label": weights[flipped]}
    canvas, axes = _axes(7, 3.4)
    axes.hist(list(groups.values()), bins=20, color=_COLOURS[:2], label=list(groups))
    axes.set(xlabel="weight of a training example", ylabel="examples")
    _legend(axes)
    means = "; ".join(
        f"{len(values)} with a {name}" + (f", mean weight {values.mean():.2f}" if len(values) else "")
        for name, values in groups.items()
    )
    return _figure(
        canvas,
        "Weights after the descent. It was never told which labels are flipped.",
        f"Two histograms of training examples by weight: {means}.",
    )


def scatter(
    points: Sequence[tuple[str, float, float]], *, stressed: Collection[str], x: str, y: str, caption: str
) -> Figure:
    """Named points.

    Arguments:
        points: (name, x, y).
        stressed: names to stress.
        x, y: names of the axes.
        caption: what the figure shows.
    """
    canvas, axes = _axes(7, 4.6)
    for number, (name, across, up) in enumerate(points, 1):
        axes.plot(across, up, "o", color=_COLOURS[1] if name in stressed else _COLOURS[0], markersize=6)
        axes.annotate(str(number), (across, up), (4, 4), textcoords="offset points", fontsize=8, color=_INK)
    axes.set(xlabel=x, ylabel=y)
    key = "; ".join(f"{number} {name}" for number, (name, *_) in enumerate(points, 1))
    read = "; ".join(f"{name} at {across:.3g}, {up:.3g}" for name, across, up in points)
    return _figure(canvas, f"{caption} {key}.", f"{caption} {y} by {x}: {read}.")


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], float]], *, x: str, y: str, caption: str
) -> Figure:
    """Curves side by side on one scale, each with the tangent that a derivative promises at zero.

    Arguments:
        series: by name, (places with zero in the middle, values there, by how much they should fall a unit of x).
        x, y: names of the axes.
        caption: what the figure shows.
    """
    canvas = _canvas(7, 3.2)
    first: Any = None
    for number, (name, (places, values, slope)) in enumerate(series.items(), 1):
        axes = first = _styled(canvas.add_subplot(1, len(series), number, facecolor="none", sharey=first))
        axes.plot(places, values, color=_COLOURS[number - 1], linewidth=2, marker="o", markersize=3.5)
        limits = axes.get_ylim()
        tangent = values[len(values) // 2] - slope * np.asarray(places)
        axes.plot(places, tangent, color=_INK, linewidth=1, linestyle="--")
        axes.set_ylim(limits)
        axes.set_title(name, fontsize=10, color=_INK)
        axes.set(xlabel=x, ylabel=y if number == 1 else "")
    read = "; ".join(f"{name} from {min(v):.3g} to {max(v):.3g}" for name, (_, v, _) in series.items())
    return _figure(canvas, caption, f"{caption} Range of {y}: {read}.")


def least_trusted(
    images: np.ndarray,
    weights: np.ndarray,
    given: np.ndarray,
    true: np.ndarray | None,
    classes: Sequence[str],
    count: int = 24,
) -> Figure:
    """The examples with the lowest weights, each with its given label, and its true one where that is known.

    Arguments:
        images: float[n, height, width, channels] in [0, 1], of one or three channels.
        weights: float[n]; ties go by position.
        given: int[n], labels trained on.
        true: int[n], or None.
        classes: names of the labels.
        count: how many to show.
    """
    rows = np.argsort(weights, kind="stable")[:count]
    across = min(6, max(len(rows), 1))
    down = max(-(-len(rows) // across), 1)
    canvas = _canvas(1.15 * across, 1.6 * down)
    for place, row in enumerate(rows):
        axes = canvas.add_subplot(down, across, place + 1)
        _show(axes, images[row])
        wrong = true is not None and given[row] != true[row]
        words = classes[int(given[row])]
        if true is not None and wrong:
            words += f"\n(is {classes[int(true[row])]})"
        axes.set_title(words, fontsize=9, color=_COLOURS[1] if wrong else _INK)
    shown = f"The {len(rows)} examples with the lowest weights, under the labels they were given"
    if true is None:
        return _figure(canvas, f"{shown}.", f"{shown}.")
    found = f"{int(np.sum(given[rows] != true[rows]))} of these {len(rows)} labels are wrong"
    return _figure(canvas, f"{shown} (orange: wrong). {found}.", f"{shown}. {found}.")


def before_and_after(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, classes: Sequence[str], count: int = 12
) -> Figure:
    """Images in pairs of rows: as they were, under their labels, and below as they became.

    Arguments:
        before, after: float[n, height, width, channels] in [0, 1], of one or three channels.
        labels: int[n].
        classes: names of the labels.
        count: how many pairs to show, from the first.
    """
    count = min(count, len(labels))
    across = min(6, count)
    bands = -(-count // across)
    canvas = _canvas(1.15 * across, 2.75 * bands)
    for place in range(count):
        band, column = divmod(place, across)
        for row, images in enumerate((before, after)):
            axes = canvas.add_subplot(2 * bands, across, (2 * band + row) * across + column + 1)
            _show(axes, images[place])
            if row == 0:
                axes.set_title(classes[int(labels[place])], fontsize=9, color=_INK)
    shown = f"{count} of the {len(labels)} poisoned images in pairs: clean above, poisoned below, labels unchanged."
    moved = f"Pixels moved by {np.abs(after - before).mean():.2f} of their range on average."
    return _figure(canvas, f"{shown} {moved}", f"{shown} {moved}")


def lines(series: Mapping[str, Sequence[float]], *, x: str, y: str, caption: str) -> Figure:
    """Lines over the positions 0, 1, ...: a loss per meta-step, say.

    Arguments:
        series: values by name; from the fifth on, colours come again in other strokes.
        x, y: names of the axes.
        caption: what the figure shows.
    """
    canvas, axes = _axes(7, 3.2)
    styles = cycle((colour, stroke) for stroke in _STROKES for colour in _COLOURS)
    for (name, values), (colour, stroke) in zip(series.items(), styles, strict=False):
        style = {"color": colour, "linestyle": stroke, "linewidth": 2, "marker": "o", "markersize": 3.5}
        axes.plot(np.arange(len(values)), values, label=name, **style)
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes)
    ends = "; ".join(f"{name} from {v[0]:.3g} to {v[-1]:.3g}" for name, v in series.items() if len(v))
    return _figure(canvas, caption, f"{caption} {y} by {x}: {ends}.")


def schedules(learnt: np.ndarray, chosen: Mapping[str, np.ndarray]) -> Figure:
    """Learning rates over a training run, on a logarithmic axis: of every meta-step, faint, and of those chosen.

    Arguments:
        learnt: float[m, T] above 0, the schedule at each meta-step, from the first.
        chosen: float[T] above 0 by name, at most four.
    """
    canvas, axes = _axes(7, 3.8)
    for number, rates in enumerate(learnt):
        axes.plot(rates, color=_COLOURS[0], linewidth=1, alpha=0.1 + 0.35 * number / max(1, len(learnt) - 1))
    for (name, rates), colour in zip(chosen.items(), _COLOURS, strict=False):
        axes.plot(rates, color=colour, label=name, linewidth=2.2)
    axes.set(xlabel="training step", ylabel="learning rate", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    _legend(axes)
    ends = "; ".join(f"{name} starts at {r[0]:.2g}, peaks at {r.max():.2g}, ends at {r[-1]:.2g}"
                     for name, r in chosen.items())  # fmt: skip
    caption = "Learning rate at every step of a training run. Faint lines: the schedule at each meta-step."
    return _figure(canvas, caption, f"{caption} {ends}.")


def against_compute(curves: Mapping[str, np.ndarray], levels: Mapping[str, float], *, y: str, caption: str) -> Figure:
    """What was reached by how much compute, with errors, on a logarithmic axis of compute.

    Arguments:
        curves: float[points, 3] by name, at most three: training runs, value, its standard error.
        levels: values that took no search worth a curve, drawn as dashed lines; with the curves at most four.
        y: name of the value.
        caption: what the figure shows.
    """
    canvas, axes = _axes(7, 3.8)
    for (name, points), colour in zip(curves.items(), _COLOURS, strict=False):
        runs, values, errors = points.T
        axes.errorbar(runs, values, errors, color=colour, label=name, linewidth=2, marker="o", markersize=4, capsize=3)
    for (name, value), colour in zip(levels.items(), _COLOURS[len(curves) :], strict=False):
        axes.axhline(value, color=colour, linestyle="--", linewidth=1.5, label=name)
    axes.set(xlabel="compute spent on the search, in training runs", ylabel=y)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    _legend(axes)
    ends = "; ".join(f"{name}: {points[-1, 1]:.3g} after {points[-1, 0]:.0f} runs" for name, points in curves.items())
    return _figure(canvas, caption, f"{caption} {ends}.")


def _show(axes: Any, image: np.ndarray) -> None:
    # Enlarged here: a browser would blur an 8 x 8 picture.
    pixels = image.repeat(8, axis=0).repeat(8, axis=1)
    axes.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()


def _canvas(width: float, height: float) -> Canvas:
    return Canvas(figsize=(width, height), layout="constrained", facecolor="none")


def _axes(width: float, height: float) -> tuple[Canvas, Any]:
    canvas = _canvas(width, height)
    return canvas, _styled(canvas.add_subplot(facecolor="none"))


def _styled(axes: Any) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.grid(axis="y", color=_INK, alpha=0.12)
    axes.set_axisbelow(True)
    return axes


def _legend(axes: Any) -> None:
    # Above the axes: a search for the best place inside takes time, and warns on a busy machine.
    axes.legend(frameon=False, labelcolor=_INK, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0)


def _figure(canvas: Canvas, caption: str, alt: str) -> Figure:
    file = BytesIO()
    # The salt makes the ids inside, and with them the bytes, the same at every call.
    with mpl.rc_context({"svg.hashsalt": "metagradient"}):
        FigureCanvasSVG(canvas).print_svg(file, metadata={"Date": None})
    head, tag, rest = file.getvalue().decode().replace(_INK, "currentColor").partition("<defs>")
    return Figure((head + _SCHEME + tag + rest).encode(), caption, alt)
