"""What a run builds: positions and windows of the configuration over those of the model it starts from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megalong.checkpoint.folder import META, Meta, step_folder
from megalong.config.schema import Config
from megalong.errors import UserError
from megalong.hf.config import read_architecture
from megalong.training.start import find_start
from tests.llama import make_llama, run_settings

ALTERNATING = {"window_size": 7, "window_attn_skip_freq": 2}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A run in `run` that starts from the Llama in `hf`."""
    return run_settings(tmp_path / "run", make_llama(tmp_path / "hf"), tmp_path / "data")


def found(settings: dict[str, Any], **sections: Any) -> tuple[int | None, ...]:
    """The windows of the model that a run with these sections starts with."""
    return find_start(Config.model_validate(settings | sections)).architecture.layer_windows


def save(folder: Path, settings: dict[str, Any], **sections: Any) -> None:
    """What `megalong.json` would say of the run after a step."""
    architecture = find_start(Config.model_validate(settings | sections)).architecture
    step = step_folder(folder, 1)
    step.mkdir(parents=True)
    (step / META).write_text(Meta(step=1, architecture=architecture).model_dump_json())


def test_the_window_of_the_configuration_is_over_the_models_own(settings: dict[str, Any], tmp_path: Path) -> None:
    assert found(settings) == (None,) * 4
    assert found(settings, attention={"window_size": 7}) == (7,) * 4
    save(tmp_path / "before", settings, attention=ALTERNATING)
    model = {"load": {"checkpoint": str(tmp_path / "before")}}
    assert found(settings, model=model) == (7, None, 7, None)
    assert found(settings, model=model, attention={"window_size": 5}) == (5,) * 4
    assert found(settings, model=model, attention=ALTERNATING | {"window_attn_skip_freq": 1}) == (None,) * 4
    shape = read_architecture(tmp_path / "hf").model_copy(update={"window_size": 3}).model_dump()
    assert found(settings, model={"architecture": shape}) == (3,) * 4
    assert found(settings, model={"architecture": shape}, attention={"window_size": 5}) == (5,) * 4


def test_a_pattern_for_another_number_of_layers(settings: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"^attention\.window_attn_skip_freq \[1, 0\] has 2 entries and the model 4 lay"
    ):
        found(settings, attention={"window_size": 7, "window_attn_skip_freq": [1, 0]})


@pytest.mark.parametrize("source_is_there", [True, False])
def test_a_resume_has_the_window_it_was_trained_with(
    source_is_there: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    save(tmp_path / "run", settings, attention=ALTERNATING)
    if not source_is_there:
        shutil.rmtree(tmp_path / "hf")
    assert found(settings, attention=ALTERNATING) == (7, None, 7, None)
    assert found(settings, attention=ALTERNATING | {"window_attn_skip_freq": [1, 0, 1, 0]}) == (7, None, 7, None)
    with pytest.raises(UserError, match="with window_size 7, window_attn_skip_freq 2, the configuration says window_s"):
        found(settings, attention={"window_size": 7})
    with pytest.raises(UserError, match=r"says no window; write that .* model\.load: \{checkpoint: "):
        found(settings, attention={"window_size": 7, "window_attn_skip_freq": 1})
    if source_is_there:
        with pytest.raises(UserError, match="the configuration says no window"):
            found(settings)


def test_a_resume_has_the_rope_it_was_trained_with_even_when_its_source_is_gone(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
    save(tmp_path / "run", settings, model=settings["model"] | {"rope": yarn})
    shutil.rmtree(tmp_path / "hf")
    assert found(settings, model=settings["model"] | {"rope": yarn}) == (None,) * 4
    with pytest.raises(
        UserError, match=r"trained under rope yarn \(factor 4,.* the configuration says yarn \(factor 8"
    ):
        found(settings, model=settings["model"] | {"rope": yarn | {"factor": 8}})


def test_a_checkpoint_from_before_windows_were_recorded(settings: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path / "run", settings)
    file = step_folder(tmp_path / "run", 1) / META
    meta = json.loads(file.read_text())
    del meta["architecture"]["window_size"], meta["architecture"]["window_attn_skip_freq"]
    file.write_text(json.dumps(meta))
    assert found(settings) == (None,) * 4
