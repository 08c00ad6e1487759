"""The fused losses in the clothes of other libraries; one module a library, imported on its own."""
