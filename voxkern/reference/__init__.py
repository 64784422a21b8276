"""The specification: every op in plain, obvious torch, accumulating in float32."""
