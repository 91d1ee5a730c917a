"""The glue to ComfyUI. No equation of the paper lives here."""
