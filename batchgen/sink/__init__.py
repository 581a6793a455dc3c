"""Results to parts to a published snapshot."""
