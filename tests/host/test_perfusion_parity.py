"""The host binding of Perfusion against the authors' recorded predictions."""

import importlib.util
import uuid
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity

_spec = importlib.util.spec_from_file_location(
    "personalize_recorded_cases", Path(__file__).parents[1] / "parity" / "conftest.py"
)
recorded = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recorded)


def perfusion_cases(*patterns):
    files = recorded.cases("perfusion", patterns)
    return pytest.mark.parametrize("path", files, ids=[f"perfusion/{path.stem}" for path in files])


@pytest.fixture
def load_case(comfy, load_helper):
    """load_case(path) -> the case and the host's MODEL."""

    def load(path):
        case = recorded.Case(path, [])
        return case, load_helper("host/golden_ldm.py").load(case)

    return load


def layers_per_block(model):
    return model.model.model_config.unet_config["num_res_blocks"][0]


def predict(model, case, superclass=None):
    """One call of the UNet as the sampler makes it, with the wrappers of the MODEL."""
    from comfyui_personalize.nodes.rank_one_edits import _TAGS, KEY

    chunk = uuid.uuid4()
    wrappers = {kind: {KEY: model.get_wrappers(kind, KEY)} for kind in ("diffusion_model",)}
    options = {"wrappers": wrappers, "uuids": [chunk], _TAGS: {} if superclass is None else {(0, chunk): superclass}}
    inputs = case.inputs
    return model.model.diffusion_model(
        inputs["x"], inputs["timesteps"], context=inputs["context"], transformer_options=options
    )


def check(case, model):
    case.check("eps", predict(model, case))
    case.check("eps_super", predict(model, case, case.inputs["context_super"]))


@perfusion_cases("unet_apply_model")
def test_prediction(load_case, path):
    from comfyui_personalize.models.keys import sgm_to_diffusers
    from comfyui_personalize.models.learned_embeddings import LearnedEmbedding
    from comfyui_personalize.models.perfusion import Concept, ConceptParts, Covariance
    from comfyui_personalize.nodes.guiding import SigmaRange
    from comfyui_personalize.nodes.rank_one_edits import GatedConcept, attach

    case, model = load_case(path)
    target = case.inputs["target_input"]
    dual = Covariance(case.inputs["C_inv"].double()).dual(target).float()
    layers = layers_per_block(model)
    outputs = {
        sgm_to_diffusers(name.removesuffix(".target_output"), layers): rows
        for name, rows in case.weights.items()
        if name.endswith(".target_output")
    }
    concept = Concept(
        LearnedEmbedding("<it>", {}), "", ConceptParts(target, dual, outputs, None), "", None, "recorded", {}
    )
    gated = GatedConcept(concept, case.config["beta"], case.config["tau"])
    check(case, attach(model, [gated], SigmaRange(0.0, 1.0)))
    assert not case.unchecked


@perfusion_cases("multi_concept_inference")
def test_several_concepts_from_the_authors_files(load_case, path):
    from comfyui_personalize.models.perfusion import read_concept
    from comfyui_personalize.nodes.guiding import SigmaRange
    from comfyui_personalize.nodes.rank_one_edits import GatedConcept, attach

    case, model = load_case(path)
    layers = layers_per_block(model)
    concepts = [read_concept(case.file(name), layers_per_block=layers) for name in case.config["files"]]
    gates = zip(concepts, case.config["beta"], case.config["tau"])
    check(case, attach(model, [GatedConcept(*gate) for gate in gates], SigmaRange(0.0, 1.0)))
    assert case.unchecked == {"projector", "target_inputs"}  # of the mathematics alone
