"""Row to request."""
