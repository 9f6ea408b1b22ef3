"""The host's page shows stock workflows and runs them on a tiny checkpoint."""

GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "tiny_sd15.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a photo of a dog"}},
    "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "4": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["1", 0],
            "positive": ["2", 0],
            "negative": ["2", 0],
            "latent_image": ["3", 0],
            "seed": 5,
            "steps": 3,
            "cfg": 7.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        },
    },
    "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
    "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
}


def test_a_stock_graph_opens_runs_and_exports_unchanged(frontend, tmp_path):
    frontend.load_api(GRAPH)
    assert sorted(frontend.nodes()) == sorted(node["class_type"] for node in GRAPH.values())
    assert not frontend.missing_nodes()
    assert not frontend.red_widgets()
    exported = {
        name: {key: node[key] for key in ("class_type", "inputs")} for name, node in frontend.export_api().items()
    }
    assert exported == GRAPH

    run = frontend.queue()
    assert run["status"] == "success", run
    assert run["progress"] >= 3
    assert frontend.node_errors() == {"marked": [], "refused": {}}
    assert frontend.screenshot(tmp_path / "stock.png").stat().st_size > 10_000
    assert not frontend.console_errors
    assert not frontend.foreign_requests


def test_unknown_nodes_and_files_are_noticed(frontend):
    frontend.load_api(GRAPH)
    workflow = frontend.export_workflow()
    for node in workflow["nodes"]:
        if node["type"] == "PreviewImage":
            node["type"] = "AbsentNode"
        if node["type"] == "CheckpointLoaderSimple":
            node["widgets_values"] = ["absent.safetensors"]
    frontend.load(workflow)
    assert frontend.missing_nodes() == ["AbsentNode"]
    assert frontend.red_widgets() == ["CheckpointLoaderSimple.ckpt_name = absent.safetensors"]
