"""In which order requests go to the engine. It never shows in the output."""
