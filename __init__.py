"""AnyStory for ComfyUI: your characters and things, several at once, in generated pictures."""

if __package__:  # pytest may import this file as a plain module while it collects
    from comfy_api.latest import ComfyExtension, io

    from .nodes import NODES

    WEB_DIRECTORY = "./web"

    class AnyStoryExtension(ComfyExtension):
        """Lists the pack's nodes."""

        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return list(NODES)

    async def comfy_entrypoint() -> AnyStoryExtension:
        """ComfyUI's entry point."""
        return AnyStoryExtension()
