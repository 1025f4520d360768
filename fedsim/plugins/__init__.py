"""Features that nothing else of fedsim knows: `fedsim.core.plugins` finds them."""
