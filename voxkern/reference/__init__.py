"""The specification: every op in plain torch, the obvious way, accumulating in float32."""
