"""Parts of optimizers: which parameters, which update, how it is rounded, and how the loss is scaled."""
