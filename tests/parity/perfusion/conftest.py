"""What several cases share: a concept's target from its covariance."""

import pytest

from comfyui_personalize.models.perfusion import BETA, TAU, Covariance, EditSpace, Target


@pytest.fixture
def covariance(case) -> Covariance:
    """The case's inverse covariance."""
    return Covariance(case.inputs["C_inv"].double())


@pytest.fixture
def one_concept(case, covariance):
    """one_concept(beta, tau) -> the edit of the case's only target input, with its own gate by default."""
    vector = case.inputs["target_input"]
    beta, tau = case.config.get("beta", BETA), case.config.get("tau", TAU)

    def space(beta=beta, tau=tau):
        return EditSpace([Target(vector, covariance.dual(vector), beta, tau)])

    return space


@pytest.fixture
def ldm_unet(load_helper):
    """The helper module that reads the recorded UNet."""
    return load_helper("parity/perfusion/ldm_unet.py")


@pytest.fixture
def tiny_unet(case, ldm_unet):
    """The frozen UNet that several cases share."""
    shared = case.sibling(case.config.get("weights_case", "tiny_ldm_unet_weights"))
    return ldm_unet.build(shared.weights, shared.config["unet_config"])
