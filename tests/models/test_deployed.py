"""A converted model of branches goes back into timm's own model, whose other branches then add nothing."""

import pytest
import torch
from trained import trained

import orepa

timm = pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")
from orepa.models.deployed import to_timm  # noqa: E402


@pytest.mark.parametrize("name", ["repvgg_a0", "fastvit_t8"])
def test_the_merged_kernels_fit_into_the_branches(name):
    arguments = {"num_classes": 5, "in_chans": 1}
    model, x = trained(orepa.prepare(timm.create_model(name, **arguments))), torch.randn(2, 1, 64, 64)
    converted = orepa.convert(model, fold_bn=False)
    generator = torch.get_rng_state()
    spec, state = to_timm({"model": name, "model_kwargs": arguments}, converted.state_dict())
    assert torch.equal(torch.get_rng_state(), generator) and spec["model"] == name
    plain = timm.create_model(name, **arguments).eval()
    plain.load_state_dict(state)
    with torch.no_grad():
        expected = model(x)
        for form in (plain, timm.utils.reparameterize_model(plain)):
            assert (form(x) - expected).norm() <= 1e-4 * expected.norm()


def test_what_has_no_place_is_named():
    spec = {"model": "repvgg_a0", "model_kwargs": {}}
    state = {"stem.reparam_conv.weight": torch.ones(48, 3, 5, 5), "stem.reparam_conv.bias": torch.ones(48)}
    with pytest.raises(ValueError, match=r"no branch of stem in timm's model can hold a kernel \[48, 3, 5, 5\]"):
        to_timm(spec, state)
    with pytest.raises(ValueError, match="has no place for other"):
        to_timm(spec, {"other": torch.ones(1)})
