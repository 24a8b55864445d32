from base64 import b64decode
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from metagradient.data.images import load_digits
from metagradient.report.figures import Figure, least_trusted, lines, weights_by_group
from metagradient.report.page import Page, Section, Table, render, write
from metagradient.tasks.means import shown, standard_error, with_error

DIGITS = load_digits().take(slice(0, 40))
GIVEN = np.where(np.arange(40) % 2 == 0, (DIGITS.labels + 1) % 10, DIGITS.labels)
WEIGHTS = np.linspace(0, 1, 40)


@cache
def figures() -> dict[str, Figure]:
    return {
        "weights": weights_by_group(WEIGHTS, DIGITS.labels != GIVEN),
        "least": least_trusted(DIGITS.images, WEIGHTS, GIVEN, DIGITS.labels, DIGITS.classes, count=10),
        "lines": lines({"target": [2.0, 1.0, 0.5], "held-out": [2.0, 1.5]}, x="meta-step", y="loss", caption="Loss."),
    }


class Elements(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.found.append((tag, dict(attrs)))

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]


@pytest.mark.parametrize("name", figures())
def test_a_figure_is_svg_that_follows_the_readers_scheme(name: str):
    content = figures()[name].content
    assert ElementTree.fromstring(content).tag.endswith("svg")
    assert b"prefers-color-scheme:dark" in content
    assert b"#010203" not in content


@pytest.mark.parametrize("name", figures())
def test_a_figure_is_the_same_at_every_call(name: str):
    assert figures.__wrapped__()[name] == figures()[name]


def test_axes_take_the_pages_ink():
    assert b"currentColor" in figures()["lines"].content


def test_alternative_texts_state_what_is_shown():
    shown = figures()
    assert "20 with a clean label, mean weight 0.51; 20 with a flipped label, mean weight 0.49" in shown["weights"].alt
    assert "5 of these 10 labels are wrong" in shown["least"].alt
    assert "target from 2 to 0.5; held-out from 2 to 1.5" in shown["lines"].alt


def test_least_trusted_takes_the_lowest_weights():
    backwards = least_trusted(DIGITS.images, -WEIGHTS, GIVEN, DIGITS.labels, DIGITS.classes, count=1)
    assert "0 of these 1 labels" in backwards.alt
    assert (
        "1 of these 1 labels"
        in least_trusted(DIGITS.images, WEIGHTS, GIVEN, DIGITS.labels, DIGITS.classes, count=1).alt
    )


def test_least_trusted_claims_nothing_of_unknown_labels():
    colour = DIGITS.images.repeat(3, axis=-1)
    assert "wrong" not in least_trusted(colour, WEIGHTS, GIVEN, None, DIGITS.classes).alt


def test_no_flipped_examples_still_give_a_figure():
    assert "0 with a flipped label." in weights_by_group(WEIGHTS, np.zeros(40, bool)).alt


def test_a_table_in_markdown():
    table = Table(("trained on", "accuracy"), [("all", 0.9), ("weights", 0.95)], "Held-out.")
    assert table.markdown() == "| trained on | accuracy |\n| --- | --- |\n| all | 0.9 |\n| weights | 0.95 |"


def page() -> Page:
    table = Table(["trained on", "accuracy"], [["all", 0.9], ["weights", 0.95]], "Held-out.", emphasis=1)
    sections = [Section("Results", "One.\n\nTwo.", table, list(figures().values())), Section("Bare")]
    return Page("Which labels <are> wrong?", "Summary & more.", sections, [("0.97", "AUROC")])


def test_a_table_for_a_terminal_keeps_brackets():
    console = Console(width=60, color_system=None)
    with console.capture() as capture:
        console.print(Table(("filter [of]", "left"), [("[bold] captions", 0.5)], "what is [left]").printed())
    for text in ("what is [left]", "filter [of]", "[bold] captions", "0.5"):
        assert text in capture.get()


def test_a_mean_of_one_seed_has_no_error():
    assert standard_error([1, 2, 6]) == pytest.approx(np.sqrt(7 / 3))
    assert np.isnan(standard_error([0.5]))
    assert with_error([0.1, 0.3], "+.1%") == "+20.0% ± 10.0%"
    assert with_error([0.5], ".2f") == "0.50"
    assert shown(-0.1, 0.02, "+.2f") == "-0.10 ± 0.02"


def test_a_page_asks_for_nothing_and_runs_nothing():
    elements = Elements(render(page()))
    addresses = [v for _, a in elements.found for k, v in a.items() if k in ("src", "href", "srcset", "action")]
    assert len(addresses) == 4
    assert all(address and address.startswith("data:") for address in addresses)
    assert not elements.named("script")
    assert "@import" not in render(page())
    assert "url(" not in render(page())


def test_a_page_embeds_its_figures_with_alternative_texts():
    for image, figure in zip(Elements(render(page())).named("img"), figures().values(), strict=True):
        assert image["alt"] == figure.alt
        assert b64decode((image["src"] or "").split(",")[1]) == figure.content


def test_a_page_escapes_text_and_keeps_paragraphs_and_emphasis():
    html = render(page())
    assert "Which labels &lt;are&gt; wrong?" in html
    assert "Summary &amp; more." in html
    assert "<p>One.</p>" in html
    assert "<p>Two.</p>" in html
    assert html.count('<tr class="emphasis"><th scope="row">weights</th><td>0.95</td></tr>') == 1
    assert html.count('class="emphasis"') == 1


def test_write(tmp_path: Path):
    write(page(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(page())
