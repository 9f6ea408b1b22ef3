"""Trainings that are cancelled, killed, queued and resumed: what is kept, and that the rest continues exactly."""

import json
import threading
import time

import psutil
import pytest
import websocket
from safetensors.torch import load_file

GROWTH_LIMIT = 64 * 2**20
"""Bytes that cancelled trainings may leave behind; one forgotten SDXL-like model in fp32 is 90 MB."""


@pytest.fixture
def busy(client, comfy_server, graphs):
    """The inputs of a dataset that takes seconds to encode, for settings with random crops."""
    graphs.fill_folder(comfy_server.base / "input" / "busy")
    return {"folder": "busy"}


def when_told(needle, act):
    """A listener that acts once, when a line of progress text contains `needle`."""
    done = []

    def listen(kind, data):
        if kind == "progress_text" and needle in data["text"] and not done:
            done.append(data["text"])
            act()

    return listen


def states(server, name):
    return sorted((server.base / "output" / "personalize" / name).glob("state-*.safetensors"))


def logged_steps(server, name):
    path = server.base / "output" / "personalize" / name / "log.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def results(server, name):
    """All tensors that a training saved."""
    folders = {"lora": server.base / "models" / "loras", "token": server.base / "models" / "embeddings"}
    return {
        f"{kind}.{key}": tensor
        for kind, folder in folders.items()
        for key, tensor in load_file(folder / f"{name}.safetensors").items()
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    different = [key for key in expected if not found[key].equal(expected[key])]
    assert not different


def assert_the_next_prompt_works(client, graphs):
    run = client.run(graphs.sampling("sd15", prefix=f"next_{time.monotonic_ns()}"))
    assert run.status == "success", run.error


def test_cancel_while_pictures_are_encoded(client, comfy_server, graphs, busy):
    settings = {"crop": "random", "crop_variants": 64, "flip": True}
    graph = graphs.training(client, "cancelled_caching", dataset=busy, **settings)
    before = graphs.files_below(comfy_server.base)
    run = client.run(graph, on_event=when_told("encoding pictures", client.interrupt))
    assert run.status == "interrupted"
    assert run.progress("train")[-1][0] < 3
    assert graphs.files_below(comfy_server.base) == before
    assert_the_next_prompt_works(client, graphs)


def test_cancel_while_captions_are_encoded(client, comfy_server, graphs):
    graph = graphs.training(client, "cancelled_text", family="sdxl", steps=200)
    before = graphs.files_below(comfy_server.base)
    run = client.run(graph, on_event=when_told("encoding captions", client.interrupt))
    assert run.status == "interrupted"
    assert graphs.files_below(comfy_server.base) == before
    assert_the_next_prompt_works(client, graphs)


def test_a_cancelled_training_is_saved_and_resumes_exactly(client, comfy_server, graphs):
    settings = {"gradient_accumulation": 2, "crop": "random", "crop_variants": 2, "flip": True, "offset_noise": 0.1}
    graph = graphs.training(client, "resumed", steps=200, **settings)
    run = client.run(graph, on_event=when_told("loss", client.interrupt))
    assert run.status == "interrupted"
    done = len(logged_steps(comfy_server, "resumed"))
    assert 1 <= done < 200
    assert [path.name for path in states(comfy_server, "resumed")] == [f"state-{done:08d}.safetensors"]
    partly = results(comfy_server, "resumed")
    assert not list(comfy_server.base.rglob("*.partial"))
    assert_the_next_prompt_works(client, graphs)

    graph["train"]["inputs"] |= {"steps": done + 2, "resume": True}
    run = client.run(graph, timeout=300)
    assert run.status == "success", run.error
    assert run.progress("train")[-2:] == [(done + 1, done + 2), (done + 2, done + 2)]
    assert logged_steps(comfy_server, "resumed") == list(range(1, done + 3))
    whole = graphs.training(client, "uninterrupted", steps=done + 2, **settings)
    assert client.run(whole, timeout=300).status == "success"
    assert_equal(results(comfy_server, "resumed"), results(comfy_server, "uninterrupted"))
    assert any(not tensor.equal(partly[key]) for key, tensor in results(comfy_server, "resumed").items())


def test_a_state_of_other_settings_is_not_resumed(client, comfy_server, graphs):
    graph = graphs.training(client, "other_settings", steps=200)
    assert client.run(graph, on_event=when_told("loss", client.interrupt)).status == "interrupted"
    before = graphs.files_below(comfy_server.base)
    graph["train"]["inputs"] |= {"rank": 4, "resume": True}
    run = client.run(graph)
    assert run.status == "error"
    assert "made with other settings" in run.error["exception_message"]
    assert "turn resume off" in run.error["exception_message"]
    assert graphs.files_below(comfy_server.base) == before


def test_cancel_while_a_preview_is_made(client, comfy_server, graphs):
    graph = graphs.training(client, "cancelled_preview", preview_every=1, preview_steps=200, steps=100)

    def interrupt_after_the_first_step():
        deadline = time.monotonic() + 120
        while not logged_steps(comfy_server, "cancelled_preview") and time.monotonic() < deadline:
            time.sleep(0.01)
        client.interrupt()

    watcher = threading.Thread(target=interrupt_after_the_first_step)
    watcher.start()
    run = client.run(graph)
    watcher.join()
    assert run.status == "interrupted"
    names = {path.name for path in (comfy_server.base / "output" / "personalize" / "cancelled_preview").iterdir()}
    assert names == {"log.jsonl", "state-00000001.safetensors"}  # and no preview
    assert results(comfy_server, "cancelled_preview")
    assert_the_next_prompt_works(client, graphs)


def test_cancelled_trainings_leave_no_memory_behind(client, comfy_server, graphs):
    process = psutil.Process(comfy_server.process.pid)

    def cancel(seed):
        graph = graphs.training(client, "forgotten", family="sdxl", steps=200, overwrite=True, seed=seed)
        assert client.run(graph, on_event=when_told("loss", client.interrupt)).status == "interrupted"
        return process.memory_info().rss

    sizes = [cancel(seed) for seed in range(4)]
    assert sizes[-1] - sizes[0] < GROWTH_LIMIT, [f"{size / 2**20:.0f} MiB" for size in sizes]


def test_queued_trainings_run_one_after_the_other(client, comfy_server, graphs):
    # Both are built before either runs, as building uploads their pictures anew.
    waiting = [graphs.training(client, name, steps=2) for name in ("queued_1", "queued_2")]
    first, second = map(client.post, waiting)
    assert first in str(client.queue()) and second in str(client.queue()["queue_pending"])
    seen = []
    for prompt in (first, second):
        run = client.follow(prompt, on_event=lambda kind, data, prompt=prompt: seen.append((prompt, kind)))
        assert run.status == "success", run.error
    assert seen.index((first, "execution_success")) < seen.index((second, "execution_start"))
    for name in ("queued_1", "queued_2"):
        assert logged_steps(comfy_server, name) == [1, 2]
        assert results(comfy_server, name)


def test_cancelling_one_of_two_queued_trainings_leaves_the_other(client, comfy_server, graphs):
    waiting = [graphs.training(client, name, steps=n) for name, n in (("queue_cancelled", 200), ("queue_kept", 2))]
    first, second = map(client.post, waiting)
    assert client.follow(first, on_event=when_told("loss", client.interrupt)).status == "interrupted"
    assert client.follow(second).status == "success"
    assert logged_steps(comfy_server, "queue_kept") == [1, 2]


def test_a_killed_server_resumes_exactly_when_it_is_started_again(
    client, comfy_server, graphs, make_server, load_helper, tmp_path
):
    settings = {"steps": 6, "checkpoint_every": 2, "learning_rate": 2e-3}
    connect = load_helper("host/client.py").Client
    with make_server(tmp_path) as server, connect(server.url, timeout=graphs.SERVER_TIMEOUT) as its_client:
        graph = graphs.training(its_client, "killed", family="sdxl", **settings)
        graph["train"]["inputs"]["steps"] = 200
        listener = when_told("loss", lambda: None)

        def kill_in_the_third_step(kind, data):
            listener(kind, data)
            if len(logged_steps(server, "killed")) >= 3:
                server.kill()

        with pytest.raises((websocket.WebSocketException, ConnectionError)):
            its_client.run(graph, on_event=kill_in_the_third_step)
        done = logged_steps(server, "killed")
        assert len(done) >= 3
        kept = int(states(server, "killed")[-1].stem.removeprefix("state-"))
        assert 2 <= kept <= len(done)
        assert not (server.base / "models" / "loras" / "killed.safetensors").exists()
    steps = kept + 3
    graph["train"]["inputs"] |= {"steps": steps, "resume": True}
    with make_server(tmp_path) as server, connect(server.url, timeout=graphs.SERVER_TIMEOUT) as its_client:
        run = its_client.run(graph)
        assert run.status == "success", run.error
        assert logged_steps(server, "killed") == list(range(1, steps + 1))
        assert not list(server.base.rglob("*.partial"))
        killed = results(server, "killed")
    whole = graphs.training(client, "never_killed", family="sdxl", **settings | {"steps": steps})
    assert client.run(whole, timeout=300).status == "success"
    assert_equal(killed, results(comfy_server, "never_killed"))
