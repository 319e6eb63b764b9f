"""The other half of test_triton_aot.py: the same for Hopper, whose matrix products are others."""

import pytest

pytest.importorskip("triton", reason="needs triton, which this torch does not bring")

from test_triton_aot import Everything


class TestHopper(Everything):
    target = "sm_90"
