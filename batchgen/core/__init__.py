"""Values and errors that everything shares."""
