"""The extension loads in the host: without complaint, and without the heavy packages that only training needs."""

import subprocess
import sys

HEAVY = ("accelerate", "bitsandbytes", "diffusers", "insightface", "peft")

# Loads the extension as the host does, and names the heavy packages that came with it.
IMPORT_EXTENSION = """
import asyncio, importlib.util, runpy, sys
boot, comfyui, extension, *heavy = sys.argv[1:]
shim = runpy.run_path(boot)  # held, since the declarations live as long as it does
shim["declare_missing_torchvision_operators"]()
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import nodes
before = {name for name in heavy if name in sys.modules}
entry = extension + "/__init__.py"
spec = importlib.util.spec_from_file_location(extension, entry, submodule_search_locations=[extension])
module = importlib.util.module_from_spec(spec)
sys.modules[extension] = module
spec.loader.exec_module(module)
async def node_ids():
    found = await module.comfy_entrypoint()
    return [node.GET_SCHEMA().node_id for node in await found.get_node_list()]
print("nodes", *asyncio.run(node_ids()))
print("heavy", *sorted({name for name in heavy if name in sys.modules} - before))
"""


def test_the_extension_loads_without_complaint(comfy_server, client, load_helper):
    log = comfy_server.log()
    folder = load_helper("host/server.py").EXTENSION_FOLDER
    times = [line for line in log.splitlines() if line.rstrip().endswith(f"custom_nodes/{folder}")]
    assert times, "the host's table of import times does not name the extension"
    assert not any("IMPORT FAILED" in line for line in times)
    assert "Error while calling comfy_entrypoint" not in log
    ours = [name for name, info in client.object_info().items() if info["python_module"].endswith(folder)]
    assert ours
    assert all(name.startswith("Personalize") for name in ours)


def test_only_this_extension_and_the_tiny_sizes_are_loaded(comfy_server, client, load_helper):
    server = load_helper("host/server.py")
    packages = {info["python_module"] for info in client.object_info().values()}
    custom = {name for name in packages if name.startswith("custom_nodes.")}
    assert custom == {f"custom_nodes.{server.EXTENSION_FOLDER}"}


def test_importing_the_extension_loads_no_training_packages(comfyui, load_helper, tmp_path):
    server = load_helper("host/server.py")
    script = tmp_path / "import_extension.py"
    script.write_text(IMPORT_EXTENSION)
    paths = [server.HERE / "boot.py", comfyui, server.PROJECT]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, paths), *HEAVY],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    words = {
        line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith(("nodes", "heavy"))
    }
    assert words["nodes"]
    assert words["heavy"] == []
