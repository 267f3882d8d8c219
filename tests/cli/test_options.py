"""Options and formats that several verbs share."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from posenc.cli._lengths import documents_option, lengths_in_windows, lengths_option, score_option
from posenc.cli._output import dry_run_option, duration, print_written
from posenc.cli._paths import bundle_option, text_option
from posenc.cli._strategy import strategies_option


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h")]
)
def test_a_duration_is_given_in_a_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lengths_are_multiples_of_the_window() -> None:
    assert lengths_in_windows((1, 2, 4), 256) == (256, 512, 1024)
    with pytest.raises(click.UsageError, match="give --lengths"):
        lengths_in_windows((1,), None)


def test_files_are_listed_one_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_written(["a.json", "b.png"])
    assert capsys.readouterr().out == "written:\n  a.json\n  b.png\n"


def test_shared_options_have_their_defaults() -> None:
    values: dict[str, object] = {}

    @click.command()
    @strategies_option
    @text_option
    @lengths_option("Input lengths in tokens.")
    @score_option
    @documents_option(32, least=2)
    @bundle_option
    @dry_run_option
    def verb(**options: object) -> None:
        values.update(options)

    assert CliRunner().invoke(verb, ["-s", "rope", "--strategy", "dca", "--lengths", "64,128,64"]).exit_code == 0
    assert values == {
        "names": ("rope", "dca"), "source": "pydoc", "lengths": (64, 128), "scored": 128, "documents": 32,
        "bundle": None, "dry_run": False,
    }  # fmt: skip
    assert CliRunner().invoke(verb, ["--documents", "1"]).exit_code == 2
