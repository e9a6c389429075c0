"""One run over many chunks."""
