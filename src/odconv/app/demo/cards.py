"""What the networks say, as HTML."""

from collections.abc import Sequence
from html import escape

from odconv.app.demo.networks import RUNS, Answer, Network
from odconv.profiling.count import count_parameters


def show_answers(answers: Sequence[Answer], device: str) -> str:
    """Return the answers side by side, and what their times are."""
    cards = "".join(show_answer(answer) for answer in answers)
    note = f"Time of the network alone for this one image on {device}: median of {RUNS} passes after a warm-up"
    turns = ", the networks taking turns" if len(answers) > 1 else ""
    return f'<div class="answers">{cards}</div><p class="note">{escape(note)}{turns}.</p>'


def show_answer(answer: Answer) -> str:
    """Return what one network says: bars, and its time."""
    rows = "".join(
        f'<li><span class="class">{escape(name)}</span><span class="share">{share:.1f} %</span>'
        f'<span class="track"><span class="bar" style="width: {share:.2f}%"></span></span></li>'
        for name, share in answer.top
    )
    network = answer.network
    return (
        f'<section class="answer {"dynamic" if network.layers else "static"}">'
        f"<header><h2>{escape(network.classifier.name)}</h2>"
        f'<p class="time"><b>{answer.milliseconds:.1f}</b> ms</p><p class="note">{describe(network)}</p></header>'
        f"<ol>{rows}</ol></section>"
    )


def describe(network: Network) -> str:
    """Return the kind and the size of a network, in two lines."""
    size = f"{count_parameters(network.model) / 1e6:.2f} million parameters"
    if not network.layers:
        return f"static<br>{size}"
    kernels = sorted({len(layer.parts) for layer in network.layers.values()})
    number, part = " or ".join(map(str, kernels)), next(iter(network.layers.values())).part
    return f"{len(network.layers)} dynamic layers of {number} {part}{'s' * (kernels != [1])}<br>{size}"


def show_problem(message: str) -> str:
    """Why there is no answer."""
    return f'<p class="problem" role="alert">{escape(message)}</p>'
