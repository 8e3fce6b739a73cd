"""The fast feed's libraries, of which Linux on other machines than x86-64 has no wheel."""

from importlib.util import find_spec

import pytest


def need_fast_feed():
    """Skip where they are not installed: `requirements.lock` installs them wherever there are wheels."""
    if find_spec("cykooz_resizer") is None:
        pytest.skip("cykooz_resizer is not installed", allow_module_level=True)
