"""ComfyUI entry point. Importing this module loads neither torch nor the host."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the extension; the host awaits this once, while it starts."""
    from .nodes import PersonalizeExtension

    return PersonalizeExtension()
