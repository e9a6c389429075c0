"""Write tiny random-weight models in the real file formats, for the demo and the tests."""
