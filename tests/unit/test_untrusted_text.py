"""Names in any script and with any character: verbatim where they are data, harmless where they are shown."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from rich.console import Console

from spikefleet import canvas, plot_text, plots
from spikefleet.cli.output import print_json, print_json_line
from spikefleet.cli.tables import print_record, print_table, text
from spikefleet.status import counting, one_line, print_line, printable, waiting
from spikefleet.tasks.classification import ClassificationReport, Ranking
from spikefleet.tasks.coco_metrics import FoundBoxes
from spikefleet.tasks.detection import DetectionReport

NAMES = (
    "[other]", "[bold]cat", "$1_bill", "$5_bill", "100%", "{x}", ":cat:", "_hidden", "\\", "a\nb", "\x1b[31mred\x1b[0m",
    "\x9b2J", "\x07bell", "\r\x00", "猫", "שלום", "قطة", "\u202egnp.exe", "caf\udce9", "😀", " ", "a" * 60, "\\frac{",
)  # fmt: skip
HARMLESS = NAMES[:9]


def output(do: Callable[[Console], None], width: int = 500) -> str:
    stream = io.StringIO()
    do(Console(file=stream, width=width, force_terminal=True, color_system=None))
    return stream.getvalue()


def is_harmless(shown: str) -> bool:
    """Whether a terminal would only show it; rich itself may move the cursor, by nothing that names contain."""
    return printable(shown) == shown


@pytest.mark.parametrize("name", NAMES)
def test_what_reaches_a_terminal_steers_nothing(name: str) -> None:
    for shown in (
        output(lambda console: print_line(console, f"class {name}")),
        output(lambda console: print_table(console, ["class", text("what")], [[name, name]])),
        output(lambda console: print_table(console, ["class", text("what")], [[name, name]]), width=30),
        output(lambda console: print_record(console, [(name, name)], title=name)),
    ):
        assert is_harmless(shown), repr(shown)
        shown.encode()


@pytest.mark.parametrize("name", HARMLESS)
def test_names_without_control_characters_are_shown_verbatim(name: str) -> None:
    assert output(lambda console: print_line(console, name)) == f"{name}\n"
    assert name in output(lambda console: print_table(console, ["class"], [[name]]))
    assert one_line(name) == name


def test_rich_alone_would_let_them_through() -> None:
    """The negative control."""
    assert "\x1b[31m" in output(lambda console: console.print("\x1b[31mred", markup=False))
    assert "[other]" not in output(lambda console: console.print("x [bold]cat", markup=True))


def test_waiting_and_counting_show_names_harmlessly() -> None:
    shown = output(lambda console: _wait(console))
    assert "\x1b[31m" not in shown
    assert "\\x1b[31mred" in shown


def _wait(console: Console) -> None:
    import time

    with waiting(console, "opening \x1b[31mred [bold]") as announce:
        time.sleep(1.2)
        announce("")
    with counting(console, "preparing \x1b[31mred") as count:
        count(1, 2)


@pytest.mark.parametrize("write", [print_json, print_json_line])
def test_json_is_valid_verbatim_and_harmless(write: Callable[[object], None], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    write({"names": list(NAMES)})
    assert json.loads(stream.getvalue()) == {"names": list(NAMES)}
    assert is_harmless(stream.getvalue())
    stream.getvalue().encode()


def draw_all(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Every plot that shows a name of a class or a file."""
    count = len(names)
    images = [torch.zeros(3, 16, 16, dtype=torch.uint8) for _ in names]
    report = ClassificationReport(names)
    rankings = [Ranking((k, (k + 1) % count), (0.7, 0.3)) for k in range(count)]
    report.draw(images, rankings, [(k + 1) % count for k in range(count)], folder / "predictions.png")
    report.draw_files(images, rankings, list(names), folder / "files.png")
    report.draw_batch(images, torch.arange(count), folder / "batch.png")
    classes = [{"name": name, "samples": 1, "top1": 1.0} for name in names]
    details = {"metrics": {"top1": 1.0}, "samples": count, "classes": classes, "confusion": np.eye(count).tolist()}
    report.write(details, rankings, list(range(count)), folder)
    boxes = FoundBoxes(np.array([[1.0, 1, 9, 9]] * count), np.full(count, 0.9), np.arange(count))
    drawn = DetectionReport(names, tuple(range(count))).draw_one(images[0], boxes)
    assert drawn.float().std() > 0
    plots.precision_recall({name: [1.0, 0.5] for name in names}, folder / "curves.png")
    plots.energy_bars(
        [{"layer": name, "input": "real", "energy_mj": 1.0} for name in names], names[0], folder / "e.png"
    )
    values = tuple(range(count))
    plots.before_and_after([plots.BeforeAfter(names[0], names[0], names, values, values)], names[0], folder / "b.png")
    return sorted(folder.glob("*.png"))


def test_every_plot_is_drawn_whatever_the_names_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = draw_all(tmp_path, NAMES)
    assert len(found) == 7
    for path in found:
        with PIL.Image.open(path) as image:
            assert image.size != (900, 120), path  # the image of a plot that cannot be drawn
    assert not caplog.records
    assert not [warning for warning in caplog.text.splitlines() if "missing from font" in warning]


@pytest.mark.filterwarnings("error:Glyph:UserWarning")
def test_no_plot_has_an_empty_box(tmp_path: Path) -> None:
    """matplotlib warns of each glyph that it draws as a box."""
    draw_all(tmp_path, ("猫", "狗", "שלום", "قطة", "😀", "é"))


def test_a_name_that_no_font_has_is_its_index_with_the_name_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot_text, "_fonts", list)
    names = ("猫", "é", "狗")
    assert plot_text.labels(names) == ["#0", "é", "#2"]
    details = {"classes": [{"name": name, "samples": 1, "top1": 1.0} for name in names]}
    assert [row[0] for row in ClassificationReport(names).table(details)[1:]] == ["猫 (#0)", "é", "狗 (#2)"]
    assert plot_text.drawable("猫 a\x1b") == "\\u732b a\\x1b"


def test_a_font_of_the_system_that_has_the_name_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """STIX, which comes with matplotlib, stands for a font of the system: it has U+24B6, the standard font here not."""
    stix = [(name, path) for name, path in plot_text._fonts() if name == "STIXGeneral"]
    only = next(iter(plot_text._glyphs(stix[0][1]) - plot_text._glyphs(plot_text._standard()) - {"\ufeff"}))
    monkeypatch.setattr(plot_text, "_fonts", lambda: stix)
    assert plot_text.labels([only]) == [only]
    assert plot_text.families([only]) == ["DejaVu Sans", "STIXGeneral"]
    assert plot_text.families(["a"]) == ["DejaVu Sans"]
    assert plot_text.font_file([only]) == stix[0][1]


def test_dollars_are_no_formulas(tmp_path: Path) -> None:
    names = ["$1_bill", "$5_bill"]
    plots.confusion_matrix(np.eye(2), names, tmp_path / "dollars.png")
    plots.confusion_matrix(np.eye(2), ["S1_bill", "S5_bill"], tmp_path / "letters.png")
    sizes = [PIL.Image.open(tmp_path / f"{name}.png").size for name in ("dollars", "letters")]
    assert sizes[0] == sizes[1]


def test_a_plot_that_fails_is_a_warning_and_says_so_and_a_full_disk_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(plots, "subplots", lambda *_, **__: 1 / 0)
        plots.confusion_matrix(np.eye(1), ["a"], tmp_path / "odd.png")
    assert "odd.png cannot be drawn: ZeroDivisionError" in caplog.text
    with PIL.Image.open(tmp_path / "odd.png") as image:
        assert image.size == (900, 120)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "save", full)
    with pytest.raises(OSError, match="No space left"):
        plots.confusion_matrix(np.eye(1), ["a"], tmp_path / "full.png")


@pytest.mark.parametrize("values", [[1.0, 1000.0], [12.0, 108.0], [2e-5, 3e-5]])
def test_axes_of_powers_have_numbers_where_formulas_are_plain_text(values: list[float], tmp_path: Path) -> None:
    figure, axis = canvas.subplots()
    axis.set(yscale="log", ylim=(min(values), max(values)))

    def labels() -> list[str]:
        both = (axis.yaxis.get_major_ticks(), axis.yaxis.get_minor_ticks())
        return [tick.label1.get_text() for ticks in both for tick in ticks if tick.label1.get_text()]

    figure.canvas.draw()
    assert any("mathdefault" in label for label in labels())
    canvas.save(figure, tmp_path / "axis.png")
    assert labels()
    assert all(np.isfinite(float(label.replace("\N{MINUS SIGN}", "-"))) for label in labels())
