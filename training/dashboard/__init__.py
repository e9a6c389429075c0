"""The run as a web page: `python -m training dashboard`. Reads only files, with the standard library's server."""
