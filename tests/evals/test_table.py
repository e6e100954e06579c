"""No figure without its floor."""

import io

from rich.console import Console

from trainer.evals.table import format_table, show_table, table_rows

RESULTS = {
    "held out": {
        "top1": 41.234,
        "top5": 70.0,
        "mean_per_class": 39.5,
        "chance": 0.5,
        "chance_top5": 2.5,
        "classes": 205.0,
        "samples": 215.0,
        "pixel_1nn": 12.3,
        "pixel_5nn": 20.0,
        "pixel_1nn_mean_per_class": 11.0,
    },
    "captions": {"image_to_text_r10": 55.0, "chance_image_to_text_r10": 5.0, "samples": 9.0},
}


def test_every_row_has_its_own_floors() -> None:
    rows = table_rows(RESULTS)
    assert [(r.figure, r.percent, r.chance, r.pixels) for r in rows] == [
        ("top1", 41.234, 0.5, 12.3),
        ("top5", 70.0, 2.5, 20.0),
        ("mean_per_class", 39.5, 0.5, 11.0),
        ("image_to_text_r10", 55.0, 5.0, None),
    ]
    assert [r.label for r in rows] == ["held out", "", "", "captions"]
    assert rows[0].remarks == "classes 205, samples 215"


def test_plain_text_is_aligned() -> None:
    lines = format_table(RESULTS).splitlines()
    assert lines[1].split() == [
        *("held", "out", "top1", "41.23", "0.50", "12.30"),
        *("classes", "205,", "samples", "215"),
    ]
    ends = {
        line.index(number) + len(number)
        for line, number in zip(lines[1:], ("41.23", "70.00", "39.50", "55.00"), strict=True)
    }
    assert len(ends) == 1


def test_a_terminal_gets_a_drawn_table_and_a_file_plain_text() -> None:
    plain, drawn = io.StringIO(), io.StringIO()
    show_table(RESULTS, Console(file=plain, width=60))
    assert plain.getvalue() == format_table(RESULTS) + "\n"
    show_table(RESULTS, Console(file=drawn, width=120, force_terminal=True))
    assert "41.23" in drawn.getvalue()
    assert "pixels 1-NN" in drawn.getvalue()
    assert "─" in drawn.getvalue()
