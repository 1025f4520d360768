"""The plugin ``export``: recorded gradients in the forms of other programs."""

PROVIDES: dict[str, str] = {}
