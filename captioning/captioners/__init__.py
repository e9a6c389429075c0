"""Models that describe a picture in sentences. One module per kind; `registry` names them."""
