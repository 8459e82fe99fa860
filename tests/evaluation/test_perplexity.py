"""Results survive the file system, tables align, pictures are pictures."""

import json
import math

import pytest
from PIL import Image

from megalong.errors import UserError
from megalong.evaluation.perplexity import PerplexityResult, perplexity_table
from megalong.evaluation.plots import plot_perplexity

LN_50, LN_20 = math.log(50), math.log(20)


def result(name="base", nll=(LN_50, LN_20, None)):
    return PerplexityResult(name, "runs/base", ["data/code"], 256, 4, [0, 64, 128, 256], list(nll), [256, 256, 0])


def test_perplexity_is_the_exponential_of_the_token_mean():
    measured = result()
    assert measured.perplexity == [pytest.approx(50), pytest.approx(20), None]
    assert measured.mean_perplexity == pytest.approx(math.sqrt(50 * 20))
    assert result(nll=(1e4, 1.0, None)).perplexity[0] == math.inf


def test_a_result_survives_the_file_system(tmp_path):
    path = tmp_path / "deep" / "result.json"
    result().save(path)
    assert PerplexityResult.load(path) == result()
    assert json.loads(path.read_text())["perplexity"][1] == pytest.approx(20)
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"format": "other"}', '{"nll": []}'])
def test_a_wrong_file_is_told_in_one_line(tmp_path, content):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"result\.json: no.*evaluate perplexity"):
        PerplexityResult.load(path)


def test_the_table_has_a_row_a_model_and_a_column_a_bucket():
    table = perplexity_table([result(), result("longer name", nll=(math.log(4.25e5), 0.0, None))])
    lines = table.splitlines()
    assert lines[0] == "| position    |     0-64 | 64-128 | 128-256 |   all |"
    assert lines[2] == "| base        |     50.0 |   20.0 |       - |  31.6 |"
    assert lines[3] == "| longer name | 4.25e+05 |   1.00 |       - | 651.9 |"
    assert len({len(line) for line in lines}) == 1


def test_different_lengths_do_not_compare():
    other = PerplexityResult("long", "x", [], 512, 4, [0, 256, 512], [1.0, 1.0], [1, 1])
    with pytest.raises(ValueError, match="long was measured at 512 tokens, base at 256"):
        perplexity_table([result(), other])


def test_the_picture_is_whole_and_small(tmp_path):
    path = tmp_path / "picture.png"
    plot_perplexity([result(), result("other", nll=(1.0, 800.0, None))], path, original_length=128)
    with Image.open(path) as image:
        image.verify()
        assert image.size[0] >= 800
    assert path.stat().st_size < 100_000
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_a_picture_that_cannot_be_written_is_told_with_the_option_of_its_command(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--output: .*picture\.png cannot be written"):
        plot_perplexity([result()], tmp_path / "file" / "picture.png")
