from pathlib import Path

import pytest

from pyquant.training.config import load_config

FOLDER = Path(__file__).parents[2] / "examples" / "sentiment"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.name)
def test_the_configuration_is_valid(file):
    config = load_config(file)
    assert config.model.path
    assert config.data.train
    assert config.quantization.method == "nf4"


def test_the_small_example_is_the_demos():
    import pyquant.demo

    assert load_config(FOLDER / "small.yaml") == load_config(Path(pyquant.demo.__file__).with_name("sentiment.yaml"))
